"""The plan of a comparison: all arms get the same settings, typed flags win, stages come before what needs them."""

import importlib
import json
import time
from pathlib import Path

import pytest

import pipeline
from infra import cli
from infra.cli import UserError
from tasks import TASKS, task_class
from train_rl import Config

ARMS = ["outcome", "outcome-long", "constant", "base-prover", "strong-prover"]


def jobs_of(given=(), **options):
    _, jobs = pipeline.plan(Config(**dict(dict(reward="pav", task="planted", run_dir="runs/x"), **options)), set(given))
    return {label: (needs, argv) for label, needs, argv in jobs}


def test_arms_differ_in_their_reward_and_in_nothing_else():
    jobs = jobs_of(arms=ARMS)
    mine = {"--reward", "--verifier", "--run-dir", "--constant-value"}
    rest = {a: [f for f in jobs[f"seed0/rl_{a}"][1] if f.split("=")[0] not in mine] for a in ["pav", *ARMS]}
    steps = pipeline.flag_value(rest["pav"], "steps")
    assert pipeline.flag_value(rest["outcome-long"], "steps") == str(int(steps) * task_class("planted").stages["long"])
    rest["outcome-long"] = [f"--steps={steps}" if f.startswith("--steps=") else f for f in rest["outcome-long"]]
    assert all(sorted(r) == sorted(rest["pav"]) for r in rest.values())
    verifier = {a: pipeline.flag_value(jobs[f"seed0/rl_{a}"][1], "verifier").split("/")[-1] for a in ["pav", *ARMS]}
    assert verifier == dict(pav="verifier", outcome="verifier", constant="verifier", **{
        "outcome-long": "verifier", "base-prover": "verifier_base", "strong-prover": "verifier_strong"})
    assert "--constant-value" in jobs["seed0/rl_constant"][1] and "--constant-value" not in jobs["seed0/rl_pav"][1]


def test_stages_stand_before_what_needs_them_and_seeds_do_not_mix():
    jobs, seen = jobs_of(arms=ARMS, seeds=2), set()
    for label, (needs, argv) in jobs.items():
        assert set(needs) <= seen and {n.split("/")[0] for n in needs} <= {label.split("/")[0]}
        assert f"--seed={label[4]}" in argv and pipeline.flag_value(argv, "run-dir") == f"runs/x/{label}"
        seen.add(label)
    assert len(jobs) == 2 * 12
    strength = {n: pipeline.flag_value(jobs[f"seed1/{n}"][1], "strength") for n in ("sft", "prover", "strong")}
    assert strength == dict(sft="5.0", prover="16.0", strong="1000.0")


def test_typed_flags_win_over_the_table():
    argv = lambda **more: jobs_of(task="countdown", **more)["seed0/rl_outcome"][1]  # noqa: E731
    table = task_class("countdown").stages["rl"]
    assert f"--num-prompts={table['num_prompts']}" in argv() and "--gate=legal" in argv()
    typed = argv(num_prompts=5, learning_rate=0.5, given=["num_prompts", "learning_rate"])
    assert "--num-prompts=5" in typed and "--learning-rate=0.5" in typed and "--gate=legal" in typed
    long = jobs_of(task="countdown", arms=["outcome-long"], steps=7, given=["steps"])["seed0/rl_outcome-long"][1]
    assert "--steps=21" in long
    sft = jobs_of(stage_flags='{"sft": {"steps": 3}}')["seed0/sft"][1]
    assert "--steps=3" in sft


def test_given_policies_and_verifiers_are_not_built():
    jobs = jobs_of(policy="P", verifier="V")
    assert list(jobs) == ["seed0/rl_pav", "seed0/rl_outcome"]
    assert jobs["seed0/rl_pav"][0] == [] and "--policy=P" in jobs["seed0/rl_pav"][1] and "--verifier=V" in jobs["seed0/rl_pav"][1]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_planned(name):
    """Its settings stand beside it or are the contract's: no third place to enter a new task."""
    model = dict(model="M") if task_class(name).needs_model else {}
    jobs = jobs_of(task=name, **model)
    scripted = task_class(name).strengths is not None
    assert {j.split("/")[1] for j in jobs} == {"sft", "verifier", "rl_pav", "rl_outcome"} | ({"prover"} if scripted else set())
    for _, argv in jobs.values():
        module = importlib.import_module(Path(argv[0]).stem)
        cli.parse(module.Config, argv[1:])  # every setting is a flag of its script
    assert scripted or pipeline.flag_value(jobs["seed0/verifier"][1], "prover-k") == "4"


@pytest.mark.parametrize("options, word", [(dict(task="jsonl"), "give --model NAME, or --policy DIR"),
                                           (dict(task="jsonl", model="M", arms=["strong-prover"]), "leave the arm strong-prover out")])
def test_what_cannot_be_planned_is_said(options, word):
    with pytest.raises(UserError, match=word):
        jobs_of(**options)


def test_finished_stages_of_other_settings_are_refused(tmp_path):
    jobs = [("seed0/sft", [], ["train_sft.py", "--steps=3"]), ("seed0/rl_pav", ["seed0/sft"], ["train_rl.py", "--alpha=1"])]
    pipeline.refuse_other_settings(tmp_path, jobs, set())
    changed = [("seed0/sft", [], ["train_sft.py", "--steps=4"]), jobs[1]]
    with pytest.raises(UserError, match="seed0/sft was made with other settings than --steps=4"):
        pipeline.refuse_other_settings(tmp_path, changed, {"seed0/sft"})
    pipeline.refuse_other_settings(tmp_path, changed, {"seed0/rl_pav"})  # not finished: made anew
    assert json.loads((tmp_path / "commands.json").read_text())["seed0/sft"] == ["train_sft.py", "--steps=4"]


def test_jobs_wait_for_what_they_need(tmp_path, capsys):
    write = "import sys, time; from pathlib import Path; {wait}; Path(sys.argv[1]).write_text(str(time.time())); "
    write += "print('made', sys.argv[1])"
    job = lambda name, *needs, wait="0": (name, list(needs), ["-c", write.format(wait=wait), str(tmp_path / name)])  # noqa: E731
    pipeline.run_jobs([job("c", "a", "b"), job("a", wait="time.sleep(0.3)"), job("b")], 2, tmp_path / "logs")
    at = {n: float((tmp_path / n).read_text()) for n in "abc"}
    assert max(at["a"], at["b"]) < at["c"]
    said = capsys.readouterr().out
    assert f"made {tmp_path / 'c'}" in said and (tmp_path / "logs/b.log").read_text() == f"made {tmp_path / 'b'}\n"


def test_a_stage_that_fails_ends_the_others_and_names_its_log(tmp_path):
    slow = ("slow", [], ["-c", f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'end')!r}).write_text('x')"])
    wrong = ("seed0/wrong", [], ["-c", "import sys; print('no such file: give --data'); sys.exit(2)"])
    with pytest.raises(UserError, match=r"seed0/wrong failed \(no such file: give --data\).*seed0_wrong.log"):
        pipeline.run_jobs([slow, wrong, ("after", ["seed0/wrong"], ["-c", ""])], 2, tmp_path / "logs")
    time.sleep(3.5)
    assert not (tmp_path / "end").exists() and not (tmp_path / "logs/after.log").exists()


def test_the_last_line_is_the_summary_and_not_the_advice():
    assert pipeline.last_line("a\nverifier: good\nnext, look:\n  python pav.py --x\n") == "verifier: good"
    assert pipeline.last_line("") == ""
