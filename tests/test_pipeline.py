"""The plan of a comparison: all arms get the same settings, typed flags win, stages come before what needs them; and how
its jobs are run: side by side, in order, ended together."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pav
import pipeline
import train_rl
import train_sft
from infra import cli
from infra.cli import UserError
from infra.runs import write_json
from papers import mrt
from pipeline import Job
from report.arms import ARMS
from tasks import TASKS, smoked, task_class

CONTROLS = ["outcome", "outcome-long", "outcome-prover", "constant", "base-prover", "strong-prover"]
SCRIPTS = {"": (["train_rl.py"], train_rl.Config), "mrt": (["-m", "papers.mrt"], mrt.Config)}
ROOT = Path(pipeline.__file__).parent


def jobs_of(given=(), config=train_rl.Config, **options):
    cfg = pipeline.with_flags(config)(**dict(dict(task="planted", run_dir="runs/x"), **options))
    _, jobs = pipeline.plan(cfg, SCRIPTS, set(given))
    return {job.label: job for job in jobs}


def differing(a, b):
    return {f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)}


def test_arms_differ_in_their_reward_and_in_nothing_else():
    jobs = jobs_of(arms=CONTROLS)
    pav_arm = jobs["seed0/rl_pav"].config
    allowed = {"outcome-long": {"reward", "run_dir", "steps"}, "outcome-prover": {"reward", "run_dir", "policy"}}
    for arm in CONTROLS:
        config = jobs[f"seed0/rl_{arm}"].config
        assert differing(config, pav_arm) <= allowed.get(arm, {"reward", "run_dir", "verifier"}), arm
    assert jobs["seed0/rl_outcome-long"].config.steps == pav_arm.steps * task_class("planted").stages["long"]
    verifier = {arm: Path(jobs[f"seed0/rl_{arm}"].config.verifier).name for arm in ["pav", *CONTROLS]}
    assert verifier == {"pav": "verifier", "outcome": "verifier", "outcome-long": "verifier", "outcome-prover": "verifier",
                        "constant": "constant", "base-prover": "verifier_base", "strong-prover": "verifier_strong"}
    assert Path(jobs["seed0/rl_outcome-prover"].config.policy).name == "prover"


def test_stages_stand_before_what_needs_them_and_seeds_do_not_mix():
    jobs = jobs_of(arms=CONTROLS, seeds=2)
    seen = set()
    for label, job in jobs.items():
        assert set(job.needs) <= seen and {n.split("/")[0] for n in job.needs} <= {label.split("/")[0]}
        assert job.config.seed == int(label[4]) and job.config.run_dir == f"runs/x/{label}"
        seen.add(label)
    assert len(jobs) == 2 * 13
    strength = {n: jobs[f"seed1/{n}"].config.strength for n in ("sft", "prover", "strong")}
    assert strength == dict(sft=5.0, prover=16.0, strong=1000.0)


def test_typed_flags_win_over_the_table():
    table = task_class("countdown").stages["rl"]
    plain = jobs_of(task="countdown")["seed0/rl_outcome"].config
    assert plain.num_prompts == table["num_prompts"]
    typed = jobs_of(task="countdown", num_prompts=5, learning_rate=0.5, given=["num_prompts", "learning_rate"])
    config = typed["seed0/rl_outcome"].config
    assert (config.num_prompts, config.learning_rate, config.guards) == (5, 0.5, plain.guards)
    long = jobs_of(task="countdown", arms=["outcome-long"], steps=7, given=["steps"])["seed0/rl_outcome-long"].config
    assert long.steps == 21
    assert jobs_of(stage_flags='{"sft": {"steps": 3}}')["seed0/sft"].config.steps == 3
    weak = jobs_of(task="countdown", stage_flags='{"sft": {"strength": 0.1}}')
    assert weak["seed0/sft"].config.strength == weak["seed0/verifier"].config.prover_strength == 0.1


def test_the_main_prover_is_the_base_another_policy_or_a_folder():
    """countdown's is Best-of-4 of the base: no second policy is built."""
    jobs = jobs_of(task="countdown")
    verifier = jobs["seed0/verifier"].config
    assert "seed0/prover" not in jobs and (verifier.prover, verifier.prover_k, verifier.prover_strength) == ("base", 4, 0.3)
    other = jobs_of(task="countdown", stage_flags='{"verifier": {"prover": "prover"}}')
    assert other["seed0/prover"].config.strength == 0.5 == other["seed0/verifier"].config.prover_strength
    assert other["seed0/verifier"].config.prover == "runs/x/seed0/prover" and other["seed0/verifier"].needs[-1] == "seed0/prover"
    folder = jobs_of(stage_flags='{"verifier": {"prover": "D"}}')["seed0/verifier"].config  # no strength is known of it
    assert (folder.prover, folder.prover_strength) == ("D", pav.Config().prover_strength)
    controls = jobs_of(arms=CONTROLS, stage_flags='{"verifier": {"prover": "D"}}')
    assert controls["seed0/verifier_base"].config.prover == "base"
    assert controls["seed0/verifier_strong"].config.prover == "runs/x/seed0/strong"


@pytest.mark.parametrize("text", ["{bad", "[1]", '{"sfx": {}}', '{"sft": 3}', '{"sft": {"stesp": 3}}',
                                  '{"sft": {"steps": "many"}}', '{"verifier": {"prover_k": 0}}',
                                  '{"verifier": {"label": ["q", "q"]}}', '{"sft": {"steps": null}}',
                                  '{"verifier": {"prover-k": 4}}'])
def test_stage_flags_that_mean_nothing_are_refused(text):
    with pytest.raises(UserError, match="--stage-flags"):
        jobs_of(stage_flags=text)


def test_a_prover_that_is_no_policy_is_refused_before_the_first_stage(tmp_path):
    words = ["--run-dir", str(tmp_path / "run"), "--stage-flags", json.dumps(dict(verifier=dict(prover="nowhere")))]
    with pytest.raises(UserError, match="no model at 'nowhere'"):
        train_rl.main(words)
    assert not (tmp_path / "run").exists()


def test_given_policies_and_verifiers_are_not_built():
    jobs = jobs_of(policy="P", verifier="V")
    assert list(jobs) == ["seed0/rl_pav", "seed0/rl_outcome"]
    rl = jobs["seed0/rl_pav"]
    assert rl.needs == [] and rl.config.policy == "P" and rl.config.verifier == "V"


def test_a_policy_given_alone_leaves_the_prover_before_its_verifier():
    jobs = jobs_of(policy="P")
    assert list(jobs) == ["seed0/prover", "seed0/verifier", "seed0/rl_pav", "seed0/rl_outcome"]
    assert jobs["seed0/verifier"].needs == ["seed0/prover"] and jobs["seed0/verifier"].config.policy == "P"
    assert jobs["seed0/rl_pav"].needs == ["seed0/verifier"]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_planned(name):
    """Its settings stand beside it or are the contract's: no third place to enter a new task."""
    model = dict(model="M") if task_class(name).needs_model else {}
    jobs = {job.label.split("/")[1]: job for job in plan_of_class(task_class(name), task=name, **model)}
    scripted = task_class(name).strengths is not None
    another = scripted and task_class(name).stages["verifier"].get("prover") != "base"
    assert set(jobs) == {"sft", "verifier", "rl_pav", "rl_outcome"} | ({"prover"} if another else set())
    classes = {"train_sft.py": train_sft.Config, "pav.py": pav.Config, "train_rl.py": train_rl.Config}
    for job in jobs.values():
        assert cli.parse(classes[job.script[0]], job.command()[1:]) == job.config  # the command line says it all
    assert scripted or jobs["verifier"].config.prover_k == 4


def plan_of_class(cls, **options):
    cfg = pipeline.with_flags(train_rl.Config)(run_dir="runs/x", **options)
    settings = pipeline.stage_settings(cfg, cls, set())
    return pipeline.SeedPlan(cfg, SCRIPTS, Path("runs/x/seed0"), settings, cls).jobs.values()


def test_mrt_has_a_loop_of_its_own_in_the_same_plan():
    jobs = jobs_of(task="probe", config=mrt.Config)
    assert list(jobs) == ["seed0/sft", "seed0/rl_mrt", "seed0/rl_outcome"]
    assert jobs["seed0/rl_mrt"].command()[:2] == ["-m", "papers.mrt"] and jobs["seed0/rl_outcome"].config.reward == "outcome"


def test_what_cannot_be_planned_is_said(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    with pytest.raises(UserError, match="no scripted demonstrator, so no strong"):
        list(plan_of_class(task_class("jsonl"), task="jsonl", model="M", arms=["strong-prover"]))
    with pytest.raises(UserError, match="give --model"):
        train_rl.main(["--task", "jsonl", "--data", str(tmp_path / "x.jsonl")])


def test_an_arm_with_another_loop_is_refused_where_nobody_knows_it():
    cfg = pipeline.with_flags(train_rl.Config)(arms=["mrt"], task="probe")
    with pytest.raises(UserError, match="python -m papers.mrt"):
        pipeline.plan(cfg, {"": SCRIPTS[""]}, set())


def test_smoke_has_a_folder_of_its_own():
    cfg = pipeline.with_flags(train_rl.Config)(smoke=True)
    root, _ = pipeline.plan(cfg, SCRIPTS, set())
    assert root == Path("runs/planted-smoke")


def test_smoke_is_the_same_in_the_plan_and_in_the_script():
    """A stage makes of --smoke what the plan has already: the same command again finds it complete."""
    for job in jobs_of(smoke=True).values():
        stage = {"train_sft.py": "sft", "pav.py": "verifier", "train_rl.py": "rl"}[job.script[0]]
        assert job.config.smoke and smoked(job.config, stage) == job.config


def test_seeds_of_a_given_policy_share_its_task(tmp_path, monkeypatch):
    """--policy X --seeds 3 is three draws of one task, the one that X was trained for."""
    write_json_folder(train_sft.Config(seed=4, run_dir=str(tmp_path / "sft")))
    planned = []
    monkeypatch.setattr(pipeline, "check", lambda cfg: None)
    monkeypatch.setattr(pipeline, "run_plan", lambda root, jobs, workers: planned.extend(jobs))
    train_rl.main(["--policy", str(tmp_path / "sft"), "--seeds", "3", "--run-dir", str(tmp_path / "r")])
    assert {job.config.task_seed for job in planned} == {4} and {job.config.seed for job in planned} == {0, 1, 2}


def test_every_arm_of_the_table_can_be_planned():
    for name, arm in ARMS.items():
        config = mrt.Config if name == "mrt" else train_rl.Config
        reward = {} if name == "mrt" else dict(reward=arm.reward)
        assert f"seed0/rl_{name}" in jobs_of(arms=[name], task="planted", config=config, **reward)


# ----------------------------------------------------------------------------------------------------
# Settings of finished stages


def finished(tmp_path, config):
    config.run_dir = str(tmp_path / "seed0/rl_x")
    write_json_folder(config)
    return Job("seed0/rl_x", ["train_rl.py"], config, [])


def write_json_folder(config):
    folder = Path(config.run_dir)
    folder.mkdir(parents=True)
    write_json(folder / "run_config.json", dataclasses.asdict(config))
    write_json(folder / "summary.json", {})


def test_finished_stages_of_other_settings_are_refused(tmp_path):
    job = finished(tmp_path, train_rl.Config(steps=3))
    pipeline.refuse_other_settings(tmp_path, job)
    for change in (dict(steps=4), dict(verifier="v"), dict(guards=["legal"])):  # added flags, and left out ones
        other = dataclasses.replace(job, config=dataclasses.replace(job.config, **change))
        name = next(iter(change)).replace("_", "-")
        with pytest.raises(UserError, match=rf"--{name}.* not .*rm -r .*rl_x"):
            pipeline.refuse_other_settings(tmp_path, other)


def test_an_outcome_arm_does_not_mind_who_watches_it(tmp_path):
    job = finished(tmp_path, train_rl.Config(reward="outcome", verifier=str(tmp_path / "seed0/verifier")))
    pipeline.refuse_other_settings(tmp_path, dataclasses.replace(job, config=dataclasses.replace(job.config, verifier="")))


def test_a_moved_experiment_is_the_same(tmp_path):
    config = train_rl.Config(policy=str(tmp_path / "a/seed0/sft"), run_dir=str(tmp_path / "a/seed0/rl_x"))
    write_json_folder(config)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = train_rl.Config(policy=str(tmp_path / "b/seed0/sft"), run_dir=str(tmp_path / "b/seed0/rl_x"))
    pipeline.refuse_other_settings(tmp_path, Job("seed0/rl_x", ["train_rl.py"], moved, []))
    elsewhere = dataclasses.replace(moved, policy=str(tmp_path / "c/seed0/sft"))
    with pytest.raises(UserError, match="--policy"):
        pipeline.refuse_other_settings(tmp_path, Job("seed0/rl_x", ["train_rl.py"], elsewhere, []))


def test_commands_of_earlier_calls_are_kept(tmp_path):
    pipeline.write_commands(tmp_path, jobs_of(arms=["outcome"]).values())
    pipeline.write_commands(tmp_path, jobs_of(arms=[], reward="outcome").values())
    lines = (tmp_path / "commands.txt").read_text().splitlines()
    assert len(lines) == 5 and sum("rl_pav" in line for line in lines) == 1


def test_a_stage_never_plans_stages(monkeypatch):
    monkeypatch.setenv(pipeline.STAGE, "1")
    with pytest.raises(UserError, match="lacks --policy"):
        train_rl.main(["--reward", "pav"])


# ----------------------------------------------------------------------------------------------------
# Running


@dataclasses.dataclass
class Words:
    """Stands for a script's config: its words are a program."""

    program: str = ""


@pytest.fixture
def run(monkeypatch, tmp_path):
    def start(job, log):
        with open(log, "a") as output:
            command = [sys.executable, "-c", job.config.program]
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    monkeypatch.setattr(pipeline, "start_job", start)
    return lambda *jobs, workers=2: pipeline.run_jobs(list(jobs), workers, tmp_path / "logs")


def job(label, program, *needs):
    return Job(label, [], Words(program), list(needs))


def test_jobs_wait_for_what_they_need(run, tmp_path, capsys):
    def writes(name, wait=0.0):
        path = str(tmp_path / name)
        return f"import time; time.sleep({wait}); open({path!r}, 'w').write(str(time.time())); print('made', {path!r})"

    run(job("c", writes("c"), "a", "b"), job("a", writes("a", 0.3)), job("b", writes("b")))
    at = {n: float((tmp_path / n).read_text()) for n in "abc"}
    assert max(at["a"], at["b"]) < at["c"]
    printed = capsys.readouterr().out
    assert f"made {tmp_path / 'c'}" in printed and (tmp_path / "logs/b.log").read_text() == f"made {tmp_path / 'b'}\n"


def test_a_stage_that_fails_ends_the_others_and_names_its_log(run, tmp_path):
    slow = job("slow", f"import time; time.sleep(3); open({str(tmp_path / 'end')!r}, 'w').write('x')")
    wrong = job("seed0/wrong", "import sys; print('no such file: give --data'); sys.exit(2)")
    with pytest.raises(UserError, match=r"seed0/wrong failed \(no such file: give --data\).*seed0_wrong.log"):
        run(slow, wrong, job("after", "", "seed0/wrong"))
    time.sleep(3.5)
    assert not (tmp_path / "end").exists() and not (tmp_path / "logs/after.log").exists()


def test_the_last_line_is_the_summary_and_not_the_advice(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("a\nverifier: good\nnext, look:\n  python pav.py --x\n")
    assert pipeline.last_line(log) == "verifier: good"
    log.write_text("")
    assert pipeline.last_line(log) == "starting"


def test_sigterm_leaves_no_stage_behind(tmp_path):
    """kill PID, as scancel and docker stop do: the stages end with the pipeline, and the same command goes on."""
    command = [sys.executable, str(ROOT / "train_rl.py"), "--steps", "2", "--workers", "2", "--run-dir", str(tmp_path / "r")]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    log = tmp_path / "r/logs/seed0_sft.log"
    end = time.time() + 120
    while not (log.exists() and list((tmp_path / "r/seed0").glob("*/run_config.json"))) and time.time() < end:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    alive = subprocess.run(["pgrep", "-f", str(tmp_path / "r/seed0")], capture_output=True, text=True).stdout
    assert alive == ""


def test_two_pipelines_do_not_share_a_folder(tmp_path):
    from infra.runs import lock_folder

    lock = lock_folder(tmp_path)
    with pytest.raises(UserError, match="in use by another process"):
        pipeline.run_plan(tmp_path, [], 1)
    lock.close()


def test_the_speedrun_is_the_plan():
    """speedrun.sh types by hand what the pipeline runs for one seed of the default task."""
    text = (ROOT / "speedrun.sh").read_text().replace("\\\n", " ")
    typed = [line.split("#")[0].split()[1:] for line in text.splitlines() if line.startswith("python ")]
    classes = {"train_sft.py": train_sft.Config, "pav.py": pav.Config, "train_rl.py": train_rl.Config}
    cfg = pipeline.with_flags(train_rl.Config)(run_dir="runs/speedrun")
    _, jobs = pipeline.plan(cfg, SCRIPTS, set())
    stages = [(words[0], cli.parse(classes[words[0]], words[1:])) for words in typed if words[0] in classes]
    assert stages == [(job.script[0], job.config) for job in jobs]
    assert typed[-1] == ["-m", "report", "runs/speedrun"]


def test_commands_json_is_read_strictly(tmp_path):
    (tmp_path / "commands.json").write_text("{bad")
    with pytest.raises(UserError, match="commands.json cannot be read"):
        pipeline.write_commands(tmp_path, [])
    (tmp_path / "commands.json").write_text(json.dumps({}))
    pipeline.write_commands(tmp_path, [])
