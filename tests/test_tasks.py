"""Downstream tasks: how they are made, and their scores against loops and against lm-eval."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

import tersor
import tiny
from conftest import all_cores
from tersor import cli, demo
from tersor.calibrate import load_tokenizer
from tersor.commands import measure
from tersor.demo_model import DemoModel
from tersor.errors import TersorError
from tersor.qweight import QSpec, Scheme
from tersor.tasks import (
    Item,
    Task,
    harness,
    local_tasks,
    read_task,
    run_tasks,
    table,
    to_dict,
    write_tasks,
)
from tersor.tasks.harness import lm_eval_tasks, task_of

COUNT = 80


@pytest.fixture(scope="module")
def made(demo_model: DemoModel) -> tuple[Task, ...]:
    return local_tasks(demo_model.held_out["code"].read_text(encoding="utf-8"), COUNT)


def words(seed: int, count: int) -> str:
    return " ".join(tiny.text(200, seed).split()[:count])


def nonsense(name: str, items: int = 7) -> Task:
    """Items on the words that the tiny tokenizer knows: of several lengths, with and without white
    space where context and choice meet, and one without a context."""
    made = []
    for number in range(items):
        context = "" if number == 3 else words(number, 4 + number) + [" ", "", "\n  "][number % 3]
        lead = " " if number % 3 == 1 else ""
        choices = tuple(lead + words(100 + 10 * number + c, 2) for c in range(2 + number % 3))
        made.append(Item(context, choices, number % len(choices)))
    return Task(name, tuple(made))


def by_hand(model: torch.nn.Module, task: Task, bos: bool) -> tuple[list[bool], list[bool]]:
    """Whether each item is right, by log-likelihood and by it per character: a sequence at a time,
    in float64."""
    tokenizer = tiny.tokenizer(bos)
    right: tuple[list[bool], list[bool]] = ([], [])
    for item in task.items:
        sums = []
        for choice in item.choices:
            context = item.context.rstrip()
            before = tokenizer.encode(context)
            ids = tokenizer.encode(item.context + choice)
            if not before:
                before, ids = [tokenizer.bos_token_id], [tokenizer.bos_token_id, *ids]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].double().numpy()
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            sums.append(sum(log_p[t - 1, ids[t]] for t in range(len(before), len(ids))))
        per_character = [s / len(choice) for s, choice in zip(sums, item.choices, strict=True)]
        for out, each in zip(right, (sums, per_character), strict=True):
            out.append(int(np.argmax(each)) == item.answer)
    return right


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("bos", [True, False])
def test_scores_agree_with_loops(bos: bool, batch: int) -> None:
    models = {"a": tiny.model("llama"), "b": tiny.model("gpt_neox")}
    tasks = [nonsense("one"), nonsense("two", 12)]
    found = run_tasks(models, tiny.tokenizer(bos), tasks, baseline="a", batch=batch)
    assert list(found) == ["a", "b"] and list(found["a"]) == ["one", "two"]
    for task in tasks:
        want = {name: by_hand(model, task, bos) for name, model in models.items()}
        for name in models:
            score, n = found[name][task.name], len(task.items)
            for got, right in zip((score.acc, score.acc_norm), want[name], strict=True):
                mean = sum(right) / n
                assert got.mean == pytest.approx(mean)
                # Of zeros and ones, so also √(p (1 − p) / (n − 1)).
                assert got.error == pytest.approx(math.sqrt(mean * (1 - mean) / (n - 1)))
            flips = sum(x != y for x, y in zip(want["a"][0], want[name][0], strict=True)) / n
            assert score.flips == pytest.approx(flips)
            assert score.items == n
            chance = sum(1 / len(item.choices) for item in task.items) / n
            assert score.chance == pytest.approx(chance)
    assert any(score.flips for score in found["b"].values())
    assert not any(score.flips for score in found["a"].values())


def test_a_long_context_loses_its_beginning() -> None:
    """A model with a table of positions sees the end, as many tokens as it has positions."""
    model, tokenizer = tiny.model("gpt2"), tiny.tokenizer(bos=False)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    item = Item(words(1, 150), (" terso", " kalo"), 0)
    run_tasks({"m": model}, tokenizer, [Task("t", (item,))])
    (ids,) = seen
    assert ids.shape == (2, tiny.CONTEXT)
    rows = {tuple(row) for row in ids.tolist()}
    wanted = [tokenizer.encode(item.context + choice) for choice in item.choices]
    assert rows == {tuple(each[-tiny.CONTEXT - 1 : -1]) for each in wanted}


def test_files_hold_what_was_written(tmp_path: Path, made: tuple[Task, ...]) -> None:
    written = write_tasks(made, tmp_path / "tasks")
    assert [path.name for path in written] == [f"{task.name}.yaml" for task in made]
    for path, task in zip(written, made, strict=True):
        assert read_task(path.with_suffix(".jsonl")) == task


def test_tasks_are_made_as_they_say(demo_model: DemoModel, made: tuple[Task, ...]) -> None:
    text = demo_model.held_out["code"].read_text(encoding="utf-8")
    assert local_tasks(text, COUNT) == made
    assert local_tasks(text, COUNT, seed=1) != made
    name, indent, bracket, order = made
    lines = {line.rstrip() for line in text.expandtabs().splitlines()}
    for task in made:
        assert len(task.items) == COUNT == len({item.context for item in task.items})
        for item in task.items:
            last = item.context.rpartition("\n")[2]
            assert any(line.startswith(last + item.choices[item.answer]) for line in lines)
            assert len(item.context) < 360
    for item in name.items:
        assert all(choice in item.context for choice in item.choices)
        lengths = [len(choice) for choice in item.choices]
        assert max(lengths) - min(lengths) <= 4
    for item in indent.items:
        assert len({choice.strip() for choice in item.choices}) == 1
    right = [item.choices[item.answer] for item in indent.items]
    begins = [len(choice) - len(choice.lstrip()) for choice in right]
    assert [begins.count(level) for level in (0, 4, 8, 12)] == [COUNT // 4] * 4
    right = [item.choices[item.answer] for item in bracket.items]
    assert all(abs(right.count(each) - COUNT / 3) <= 2 for each in ")]}")
    for item in order.items:
        assert len({"".join(sorted(choice)) for choice in item.choices}) == 1
        assert item.choices[item.answer] in lines


def test_little_text_gives_no_task() -> None:
    with pytest.raises(TersorError, match="gives 0 items of name, not 100; give more Python"):
        local_tasks("x = 1\n" * 50)


@pytest.mark.slow
def test_a_trained_model_knows_and_a_random_one_guesses(
    demo_model: DemoModel, made: tuple[Task, ...]
) -> None:
    """By four standard errors of a guess."""
    trained = demo.original(demo_model).float()
    torch.manual_seed(0)
    random = AutoModelForCausalLM.from_config(trained.config).eval()
    with all_cores():
        found = run_tasks(
            {"trained": trained, "random": random}, load_tokenizer(demo_model.folder), made
        )
    above = []
    for task in made:
        score, guess = found["trained"][task.name], found["random"][task.name]
        error = math.sqrt(guess.chance * (1 - guess.chance) / guess.items)
        assert abs(guess.acc.mean - guess.chance) < 4 * error, task.name
        above.append(score.acc.mean - score.chance > 4 * error)
    # A small model: of four, three must stand out by themselves, and all of them together.
    assert sum(above) >= 3
    assert all(
        found["trained"][task.name].acc.mean > found["trained"][task.name].chance for task in made
    )


@pytest.mark.slow
def test_lm_eval_gives_the_same_figures(
    demo_model: DemoModel,
    made: tuple[Task, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("needs lm-eval, of the extra [tasks]")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    out = tmp_path / "int4"
    tersor.quantize_checkpoint(demo_model.folder, out, scheme=Scheme(QSpec(4)), method="rtn")
    model = tersor.load(out, torch.float32)
    tasks = [Task(task.name, task.items[:25]) for task in made]
    files = write_tasks(tasks, tmp_path / "tasks")
    theirs = lm_eval_tasks(out, files, model=model, batch=4)
    ours = run_tasks({"m": model}, load_tokenizer(out), tasks)["m"]
    assert list(theirs) == list(ours)
    for name, score in ours.items():
        for metric, estimate in (("acc", score.acc), ("acc_norm", score.acc_norm)):
            assert theirs[name][metric] == pytest.approx(estimate.mean)
            assert theirs[name][f"{metric}_stderr"] == pytest.approx(estimate.error)
    few = lm_eval_tasks(out, files[:1], model=model, limit=3)
    assert round(3 * few[tasks[0].name]["acc"]) == pytest.approx(3 * few[tasks[0].name]["acc"])
    with pytest.raises(TersorError, match="knows no task no_such_task"):
        lm_eval_tasks(out, [files[0], "no_such_task"], model=model)


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(TersorError, match=r"pip install tersor\[tasks\]"):
            lm_eval_tasks(tmp_path, ["arc_easy"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(TersorError, match="there is no task file"):
        lm_eval_tasks(tmp_path, [tmp_path / "absent.yaml"])
    (tmp_path / "nameless.yaml").write_text("group: x\n", encoding="utf-8")
    with pytest.raises(TersorError, match="no line `task: NAME`"):
        lm_eval_tasks(tmp_path, [tmp_path / "nameless.yaml"])


def test_tasks_that_are_not_there_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a path that is wrong, which is told before a model is loaded, nor a task that fails
    when all else is measured."""
    folder, text = tiny.save(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(tiny.text())
    arguments = ["eval", str(folder), "--text", str(text), "--samples", "2", "--seq-len", "32"]
    arguments += ["--tasks", str(tmp_path / "absent.yaml")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with monkeypatch.context() as patched:
        patched.setattr(measure, "load_model", lambda name: pytest.fail("loaded"))
        assert cli.main(arguments) == 2
    assert "there is no task file" in capsys.readouterr().err

    def fail(*_: object, **__: object) -> None:
        raise TersorError("the task has no data")

    monkeypatch.setattr(harness, "check", lambda names: None)
    monkeypatch.setattr(harness, "lm_eval_tasks", fail)
    assert cli.main(arguments) == 1
    shown = capsys.readouterr()
    assert "the task has no data" in shown.err
    assert "perplexity" in shown.out


def test_a_line_ends_where_json_lines_say(tmp_path: Path) -> None:
    """A text may hold what Unicode calls the end of a line, as write_tasks leaves it."""
    task = Task("t", (Item("a\u2028b\u0085c", ("\x0bd", "e\r\n"), 1),) * 2)
    (path,) = write_tasks([task], tmp_path)
    assert read_task(path.with_suffix(".jsonl")) == task


def test_errors_name_the_cause(tmp_path: Path) -> None:
    good = Item("a", ("b", "c"), 0)
    for choices, answer, cause in (
        (("b",), 0, "two choices at the least"),
        (("b", ""), 0, "none that is empty"),
        (("b", "b"), 0, "are the same"),
        (("b", "c"), 2, "the answer is 2, and the choices are 0 to 1"),
    ):
        with pytest.raises(TersorError, match=cause):
            Item("a", choices, answer)
    for name in ("", "a b", "../a"):
        with pytest.raises(TersorError, match="no name of a task"):
            Task(name, (good,))
    with pytest.raises(TersorError, match="no items"):
        Task("t", ())
    for line, cause in (
        ("{", "line 2: Expecting"),
        ('{"context": "a", "choices": ["b", "c"]}', "line 2: no item"),
        ('{"context": "a", "choices": ["b", 3], "answer": 0}', "line 2: no item"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "line 2: no item"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "line 2: an item needs two"),
        ('{"context": "\\ud800", "choices": ["b", "c"], "answer": 0}', "surrogate"),
    ):
        path = tmp_path / "t.jsonl"
        path.write_text(
            json.dumps({"context": "a", "choices": ["b", "c"], "answer": 1}) + "\n" + line
        )
        with pytest.raises(TersorError, match=cause):
            read_task(path)
    with pytest.raises(TersorError, match="cannot read"):
        read_task(tmp_path / "absent.jsonl")

    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    task = nonsense("t")
    with pytest.raises(TersorError, match="the baseline 'x' is none of m"):
        run_tasks({"m": model}, tokenizer, [task], baseline="x")
    with pytest.raises(TersorError, match="two tasks have the same name"):
        run_tasks({"m": model}, tokenizer, [task, task])
    small = tiny.model("llama", vocab_size=20)
    with pytest.raises(TersorError, match="small has a vocabulary of 20"):
        run_tasks({"small": small}, tokenizer, [task])
    long = Task("t", (Item("ter", (" " + words(1, 90), " so"), 0),))
    with pytest.raises(TersorError, match=r"a choice has \d+ tokens, and m has 64 positions"):
        run_tasks({"m": model}, tokenizer, [long])
    broken = tiny.model("llama")
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(TersorError, match="not finite"):
        run_tasks({"m": broken}, tokenizer, [task])


def test_scores_as_json_and_as_a_table() -> None:
    models = {"a": tiny.model("llama"), "b": tiny.model("gpt_neox")}
    found = run_tasks(models, tiny.tokenizer(), [nonsense("t")], baseline="a")
    content = json.loads(json.dumps(to_dict(found)))
    assert content["b"]["t"]["acc"]["mean"] == found["b"]["t"].acc.mean
    assert content["b"]["t"]["flips"] == found["b"]["t"].flips
    assert (table(found).row_count, len(table(found).columns)) == (2, 7)
    alone = run_tasks({"a": models["a"]}, tiny.tokenizer(), [nonsense("t")])
    assert len(table(alone).columns) == 6


def task_file(folder: Path, name: str, **changes: object) -> Path:
    content = {"task": name, "dataset_path": "json", "output_type": "multiple_choice"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return path


def test_task_files_name_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever by which lm-eval would import, download or run something."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')")
    tag = tmp_path / "tag.yaml"
    tag.write_text("task: tag\nprocess_docs: !function mine.process\n")
    (tmp_path / "base").write_text("doc_to_text: !function mine.text\n")
    metrics = [{"metric": "acc", "hf_evaluate": True}]
    for path, cause in (
        (tag, r"names a Python function \(!function mine.process\)"),
        (task_file(tmp_path, "a", include="base"), r"base names a Python function"),
        (task_file(tmp_path, "b", unsafe_code=True), "sets unsafe_code, by which code is run"),
        (task_file(tmp_path, "c", dataset_kwargs={"trust_remote_code": True}), "trust_remote_code"),
        (task_file(tmp_path, "d", metric_list=metrics), "sets hf_evaluate"),
        (task_file(tmp_path, "e", dataset_path="mine.py"), "dataset_path is a Python file"),
        (task_file(tmp_path, "f", **{"class": "mine.Task"}), "a class or a group"),
    ):
        with pytest.raises(TersorError, match=cause) as error:
            harness.check([path])
        assert "lm-eval" in str(error.value) or path.stem == "f"
    (tmp_path / "object.yaml").write_text("task: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(TersorError, match="not YAML that can be read"):
        harness.check([tmp_path / "object.yaml"])


def test_task_files_include_what_lies_beside_them(tmp_path: Path) -> None:
    """As lm-eval merges them: the file's own keys win, and later files over earlier ones."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "base").write_text("output_type: generate_until\nnum_fewshot: 1\ntest_split: a\n")
    (home / "other").write_text("test_split: b\n")
    found = task_of(task_file(home, "t", include=["base", "other"]))
    assert found == {
        "output_type": "multiple_choice",
        "num_fewshot": 1,
        "test_split": "b",
        "task": "t",
        "dataset_path": "json",
    }
    (tmp_path / "outside").write_text("num_fewshot: 2\n")
    (home / "link").symlink_to(tmp_path / "outside")
    for name in ("../outside", str(tmp_path / "outside"), "link"):
        with pytest.raises(TersorError, match="is not in its folder"):
            task_of(task_file(home, "t", include=name))
    for name, cause in (("t.yaml", "includes itself"), ("gone", "there is no task file"),
                        ([3], "include is the name of a file")):  # fmt: skip
        with pytest.raises(TersorError, match=cause):
            task_of(task_file(home, "t", include=name))
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    for number in range(1, 12):
        lines.append(f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 8)}]")
    (home / "grows.yaml").write_text("\n".join(["task: grows", *lines]))
    assert task_of(home / "grows.yaml")["task"] == "grows"


def test_one_failing_task_of_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a package in lm-eval's place that has what is used of it."""
    fake = tmp_path / "fake" / "lm_eval"
    for name, text in FAKE.items():
        (fake / name).parent.mkdir(parents=True, exist_ok=True)
        (fake / name).write_text(text)
    monkeypatch.syspath_prepend(fake.parent)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    folder = tiny.save(tmp_path / "model")
    mine = [task_file(tmp_path, name, metric_list=[{"metric": "acc"}]) for name in ("one", "two")]
    stranger = task_file(tmp_path, "stranger", task="builtin")
    assert stranger.exists()
    failed: dict[str, str] = {}
    found = lm_eval_tasks(folder, [*mine, "builtin"], model=object(), failed=failed)
    assert found == {"one": {"acc": 0.5}, "builtin": {"acc": 0.5}}
    assert failed == {"two": "ConnectionError: no network"}
    with pytest.raises(ConnectionError):
        lm_eval_tasks(folder, mine, model=object())
    with pytest.raises(TersorError, match="knows no task absent"):
        harness.check([mine[0], "absent"])
    with pytest.raises(TersorError, match="the task one is given twice"):
        harness.check([mine[0], mine[0]])
    odd = task_file(tmp_path, "odd", metric_list=[{"metric": "rogue"}])
    with pytest.raises(TersorError, match="no metric 'rogue' and would download one"):
        harness.check([odd])
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)


# lm-eval as far as it is used: tasks are found in YAML, one of them fails, and templates are
# rendered by an environment of its own, which must be a sandbox while files are read.
FAKE = {
    "__init__.py": """
from jinja2.exceptions import SecurityError

from lm_eval import utils


def simple_evaluate(model, tasks, task_manager, limit, log_samples):
    (name,) = tasks
    assert task_manager.files.get(name, {"metric_list": 1})["metric_list"]
    try:
        utils.env.from_string("{{ ''.__class__.__mro__ }}").render()
    except SecurityError:
        pass
    else:
        raise AssertionError("a template has reached Python")
    assert utils.env.from_string("{{ x | twice }}").render(x="a") == "aa"
    if name == "two":
        raise ConnectionError("no network")
    return {"results": {name: {"acc,none": 0.5, "alias": name}}}
""",
    "utils.py": """
from jinja2 import BaseLoader, Environment, StrictUndefined

env = Environment(loader=BaseLoader, undefined=StrictUndefined, keep_trailing_newline=True)
env.filters["twice"] = lambda text: 2 * text
""",
    "tasks/__init__.py": """
from pathlib import Path

import yaml


class TaskManager:
    def __init__(self, include_path, include_defaults):
        paths = [each for path in include_path or [] for each in Path(path).glob("*.yaml")]
        read = [yaml.safe_load(path.read_text()) for path in paths]
        self.files = {content["task"]: content for content in read}
        self.all_tasks = [*self.files, *["builtin"] * include_defaults]
""",
    "api/__init__.py": "",
    "api/metrics.py": """
from lm_eval.api.registry import METRIC_REGISTRY

METRIC_REGISTRY["acc"] = None
""",
    "api/registry.py": "METRIC_REGISTRY = {}\n",
    "models/__init__.py": "",
    "models/huggingface.py": "class HFLM:\n    def __init__(self, **settings): ...\n",
}
