"""Builds kernels for named GPUs without one: from the signature that the launching code would give Triton."""

import itertools
import re
import subprocess

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from chunked_ce.kernels import launch
from chunked_ce.kernels.token_grad import token_grad_kernel
from chunked_ce.kernels.token_stats import token_stats_kernel

LOGITS = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
