"""The README's snippets on integrations, run in order, a section in a namespace of its own."""

import re

import pytest
import torch
from helpers import ROOT

from bench.huggingface import batch, build

README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(section: str) -> list[str]:
    """The Python blocks below a heading, up to the next one."""
    _, found, rest = README.partition(f"\n### {section}\n")
    assert found, section
    return re.findall(r"```python\n(.*?)```", re.split(r"\n##", rest)[0], flags=re.DOTALL)


def run(section: str, names: dict) -> dict:
    blocks = snippets(section)
    assert blocks
    for block in blocks:
        exec(compile(block, f"README, {section}", "exec"), names)
    return names


def given() -> dict:
    return dict(model=build("Llama"), **batch())


def test_transformers(capsys):
    names = run("transformers", given())
    assert capsys.readouterr().out == f"{batch()['labels'].shape}\n"
    assert all(p.grad is not None for p in names["model"].parameters())
    assert isinstance(names["model"](**batch()).logits, torch.Tensor), "disabled"


def test_trainer_and_peft(tmp_path):
    from test_trainer import examples
    from transformers import TrainingArguments

    pytest.importorskip("peft")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", save_strategy="no", use_cpu=True
    )
    blocks = snippets("Trainer and PEFT")
    assert len(blocks) == 2, "each starts from a model of its own"
    names = given() | dict(args=arguments, dataset=examples())
    exec(blocks[0], names)
    assert names["trainer"].state.global_step == 2
    names = given()
    exec(blocks[1], names)
    assert sum(p.grad is not None for p in names["model"].parameters()) == 8


def test_trl():
    pytest.importorskip("trl")
    names = run("TRL", {})
    assert issubclass(names["ModelsLoss"], names["SFTTrainer"])
