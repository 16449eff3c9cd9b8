"""Tests that decide about each module in `make mutate`. They are few and reach all of it; the quickest come first."""

from pathlib import Path

STATISTICS = "test_values or head_and or under_a_common or keep_their_digits or confident or infinity or non_finite"
MORE_STATISTICS = "all_logits_equal or far_apart or ties or ignore_index_any or every_output"
VIEWS = "test_strides or unbatched or ignored_row or target_dtypes"
TARGETS = "every_target or masked or several_parts"
LOSS = "test_options or test_upstream or token_weight or nothing_to or plus_zero or few_classes"


def _torch(tests: str) -> str:
    return f"torch- and ({tests}) or torch] and ({tests})"


def _triton(tests: str) -> str:
    return f"triton and ({tests})"


def _of(file: str, *expression: str) -> list[str]:
    (path,) = Path("tests").glob(f"*/{file}.py")
    return [str(path), *(["-k", *expression] if expression else [])]


_EVERYTHING = "everything or low_precision_gradient"
_TORCH = [
    _of("test_stats", "not triton"),
    _of("test_token_stats", _torch(f"{STATISTICS} or {MORE_STATISTICS} or {_EVERYTHING}")),
    _of("test_cross_entropy", _torch(f"{LOSS} or softcap_is_felt or few_classes")),
    _of("test_drop_in", _torch(f"{TARGETS} or confident or padding or linear")),
    _of("test_grad_in_forward", _torch("not operators and not compile")),
    _of(
        "test_token_stats", _torch(f"{VIEWS} or bit_identity_twice or far_below") + " or far_below"
    ),
]
_ELSEWHERE = [
    _of("test_token_stats", "accelerators"),
]
# The interpreter takes seconds a case: one case of each kind.
_FLOAT32 = "float32 and (301] or 17])"
_TRITON = [
    _of("test_token_stats", _triton(f"(test_values or everything) and {_FLOAT32} or ties")),
    _of("test_token_stats", _triton("confident and (40] or 10]) or non_finite or head_and and 70")),
    _of("test_token_stats", _triton("common and float32 or infinity or low_precision or unbatched")),
    _of("test_token_stats", f"poisons or {_triton('everything and bfloat16 and 100 or nan_target or either_sign')}"),
    _of("test_cross_entropy", _triton("few_classes and 3- or softcap_is_felt")),
]  # fmt: skip
_OF_VIEWS = [_of("test_token_stats", _triton("test_strides or ignored_row or every_output"))]
_OF_WEIGHTS = [
    _of("test_drop_in", _triton("masked_classes or confident and probabilities or several_parts"))
]
_ONE_PASS = [
    _of("test_grad_in_forward", "(chip or streamed) and (value_and or odd and (65 or 3]))"),
    _of("test_grad_in_forward", "(chip or streamed) and (extremes or out_of_range or all_ignored)"),
    _of("test_grad_in_forward", "(chip or streamed) and (strided or upstream or token_weight)"),
    _of("test_drop_in", _triton("all_smoothed")),
]  # fmt: skip
_RANKS = _of("test_perplexity_meter", "ranks_report")
_REPORTS = [
    _of("test_perplexity"),
    _of("test_perplexity_meter", "not ranks_report"),
    _of("test_evaluation", "not mistakes"),
]
_LINEAR = _of(
    "test_linear",
    "(torch- or torch] or not triton) and not compile and not operators and not readme",
)

_FRAMEWORK = "not compile and not operators and not gradcheck and not threads"
_PAIRS = [
    _of("test_kl_div", f"not triton and {_FRAMEWORK}"),
    _of("test_reports_of_losses", "not triton"),
]
_HEADS_OF_PAIRS = [
    _of("test_linear_kl_div", f"not triton and {_FRAMEWORK}"),
    _of("test_reports_of_losses", "not triton"),
    _of("test_laws_of_pairs", "fast and heads"),
]
_CALLED = [_of("test_callable_head"), _of("test_laws_of_pairs", "fast and called")]
_CPU = [
    _of("test_backend_cpu", "not instruction_sets"),
    _of("test_token_stats", "cpu and not compile"),
    _of("test_grad_in_forward", "cpu and not compile"),
    _of("test_drop_in", "cpu"),
]
_CPU_PAIRS = [_of("test_kl_div", f"cpu and {_FRAMEWORK}"), _of("test_fuzz_kl_div", "fast and cpu")]

TESTS: dict[str, list[list[str]]] = {
    "chunked_ce/core/divergence.py": _PAIRS,
    "chunked_ce/backends/torch_pair.py": _PAIRS,
    "chunked_ce/backends/cpu_pair.py": _PAIRS,
    "chunked_ce/ops/pair.py": [*_PAIRS, _of("test_kl_div", "operators and not triton")],
    "chunked_ce/ops/linear_pair.py": _HEADS_OF_PAIRS,
    "chunked_ce/functional/distillation.py": [*_PAIRS, *_HEADS_OF_PAIRS],
    "chunked_ce/checks/distillation.py": [
        _of("test_kl_div", "(bad or options or one_row) and not triton"),
        _of("test_linear_kl_div", "(bad or options or padded) and not triton"),
        _of("test_mixed_up"),
    ],
    "chunked_ce/ops/head_calls.py": _CALLED,
    "chunked_ce/ops/callable_head.py": _CALLED,
    "kernels/cpu/divergence.h": _CPU_PAIRS,
    "kernels/cpu/pair.c": _CPU_PAIRS,
    "kernels/cpu/statistics.h": _CPU,
    "kernels/cpu/gradient.h": _CPU,
    "kernels/cpu/exp_f32.h": [*_CPU[:2], *_CPU_PAIRS[:1]],
    "kernels/cpu/exp_f64.h": [*_CPU[:2], *_CPU_PAIRS[:1]],
    "kernels/cpu/load.h": [*_CPU, *_CPU_PAIRS],
    "kernels/cpu/rows.h": _CPU,
    "kernels/cpu/run.c": _CPU,
    "kernels/cpu/finish.c": _CPU,
    "kernels/cpu/elementwise.c": [_of("test_backend_cpu_binary"), _of("test_binary", "cpu and not compile")],
    "chunked_ce/core/row_stats.py": _TORCH,
    "chunked_ce/backends/torch_blocks.py": [
        *(*_TORCH[:2], _TORCH[5], *_TORCH[2:5]),
        _of("test_state", "inference"),
        _of("test_binary", _torch("labels or views")),
        _of("test_drop_in", _torch("not_copied")),
    ],
    "chunked_ce/backends/torch.py": [*_TORCH, *_ELSEWHERE],
    "chunked_ce/backends/cpu.py": [_of("test_backend_cpu"), _of("test_token_stats", "cpu"), _of("test_drop_in", "cpu")],
    "chunked_ce/backends/cpu_library.py": [_of("test_backend_cpu"), _of("test_backend_cpu_threads", "library")],
    "chunked_ce/backends/cpu_binary.py": [_of("test_backend_cpu_binary"), _of("test_binary", "cpu and not compile and not operators and not memory")],
    "chunked_ce/backends/strided_rows.py": [_of("test_strided_rows"), *_OF_VIEWS, _of("test_binary", _triton("views"))],
    "chunked_ce/ops/chunks.py": [_LINEAR],
    "chunked_ce/core/reduction.py": [
        *(_TORCH[2], _TORCH[4], _TORCH[3]),
        _of("test_drop_in", "no_weight"),
        _of("test_linear", "token_weight or num_items or loss_scale"),
    ],
    "chunked_ce/functional/targets.py": [_TORCH[3], _of("test_drop_in", "torch or device or signatures or positional or ignore_index_error")],
    "chunked_ce/functional/distributions.py": [_TORCH[3], _of("test_drop_in", "torch or device or signatures")],
    "chunked_ce/core/class_logits.py": [_TORCH[3], _of("test_drop_in", "torch or device or signatures or positional or ignore_index_error")],
    "chunked_ce/evaluation/windows.py": [_of("test_windows")],
    "chunked_ce/evaluation/documents.py": [_of("test_evaluation"), _of("test_scored_bytes")],
    "chunked_ce/evaluation/first_token.py": [_of("test_scored_bytes")],
    "chunked_ce/evaluation/scoring.py": [_of("test_evaluation", "not mistakes"), _RANKS],
    "chunked_ce/evaluation/report.py": _REPORTS,
    "chunked_ce/evaluation/meter.py": [*_REPORTS[:2], _RANKS],
    "chunked_ce/distributed/shards.py": [_of("test_distributed", "2")],
    "chunked_ce/backends/torch_binary.py": [_of("test_binary", "torch and not compile and not operators and not memory")],
    "kernels/rows.py": [*_TRITON, *_OF_VIEWS],
    "kernels/online_softmax.py": [*_TRITON, *_OF_WEIGHTS, *_OF_VIEWS],
    "kernels/token_stats.py": [*_TRITON, *_OF_WEIGHTS, _of("test_stats", _triton("shard"))],
    "kernels/merge_parts.py": [*_TRITON, *_OF_WEIGHTS],
    "kernels/token_grad.py": [*_TRITON, *_OF_WEIGHTS, *_OF_VIEWS],
    "kernels/loss_and_grad.py": _ONE_PASS,
    "kernels/scale.py": [_of("test_grad_in_forward", "triton and (upstream or strided or ignored)"), *_ONE_PASS],
    "kernels/binary.py": [_of("test_binary", _triton("not compile and not operators and not memory"))],
}  # fmt: skip
