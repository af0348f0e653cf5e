"""The training program: really stopped, really killed, and fed what a user may get wrong."""

import random
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from small_configs import small
from survival import survive
from training_processes import Training, newest_step, rows
from untrained_models import write

from unclip_jax import checkpoint, metrics, sharding, train
from unclip_jax import config as configs
from unclip_jax.errors import InputError
from unclip_jax.stages import base
from unclip_jax.stages.clip import CLIPStage

# Every third step is saved, which takes a hundred times as long as a step does.
STEPS = 60


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run takes over these signals; pytest wants them back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def config(data_dir):
    """Six steps of a small CLIP, for runs in this process."""
    config = configs.load("tests/small_clip.py:6")
    with config.unlocked():
        config.data.data_dir = data_dir
    return config


@pytest.fixture
def one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(train.sharding, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))


def changed(config: ConfigDict, **values) -> ConfigDict:
    """A copy with other values, written `optim__eps=1e-6`."""
    copy = ConfigDict(config.to_dict())
    for key, value in values.items():
        copy.update_from_flattened_dict({key.replace("__", "."): value})
    return copy.lock()


def zeros(tree):
    return jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), tree)


def save_state(run_or_program, workdir, config, *, step=3, **extra):
    """Writes a checkpoint of that step, as a run would have."""
    state = zeros(run_or_program.state).replace(step=jnp.int32(step))
    saver = checkpoint.Checkpointer(workdir, every_steps=1, keep=2)
    saver.save(state, config=config, extra=extra)
    saver.close()
    return state


def test_a_stopped_run_goes_on_bit_for_bit_even_where_its_last_checkpoint_is_damaged(tmp_path, data_dir):
    def start(name):
        return Training(tmp_path / name, steps=STEPS, data_dir=data_dir, cache=str(tmp_path / "cache"))

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert start("straight").wait() == 0
    reference = dict(rows(straight))
    assert sorted(reference) == list(range(1, STEPS + 1))

    training = start("stopped")
    assert training.wait_for_rows(20)
    training.process.send_signal(signal.SIGTERM)
    assert training.wait() == 42
    last = rows(stopped)[-1][0]
    assert 20 <= last < STEPS and newest_step(stopped) == last
    assert f"stopped at step {last}; run the same command to go on" in training.log.read_text()

    params = stopped / "checkpoints" / str(last) / "params"
    file = max((path for path in params.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    training = start("stopped")
    assert training.wait() == 0
    log = training.log.read_text()
    before = int(re.search(r"resuming from step (\d+), the newest whole checkpoint", log)[1])
    assert before < last and f"checkpoint {last} of" in log and "damaged and passed over" in log
    written = rows(stopped)
    assert [step for step, _ in written] == [*range(1, last + 1), *range(before + 1, STEPS + 1)]
    assert [reference[step] for step, _ in written] == [loss for _, loss in written]
    whole = metrics.read(stopped)
    assert all(whole[step]["grad_norm"] == row["grad_norm"] for step, row in metrics.read(straight).items())
    evaluated = {name: value for name, value in whole[STEPS].items() if name.startswith("evaluation/")}
    assert evaluated and evaluated.items() <= metrics.read(straight)[STEPS].items()

    training = start("stopped")  # a run that is over is over
    assert training.wait() == 0 and rows(stopped) == written


def test_three_kills_change_nothing(tmp_path, data_dir):
    trial = survive(tmp_path, kills=3, seed=random.randrange(1 << 30), steps=100, data_dir=data_dir)
    assert trial.kills == 3 and not trial.faults


def test_a_bad_step_is_skipped_and_too_many_stop_the_run_naming_them(
    config, one_device, tmp_path, monkeypatch, caplog, data_dir
):
    """The loss of the fourth batch is infinite: whether any of its examples, and no other, is there decides it."""
    probe = train.Input(train.build(config, train.sharding.make_mesh(config.mesh)))
    batches = probe.training(0)
    ids = [next(batches)["id"] for _ in range(6)]
    batches.close()
    assert len(set(np.concatenate(ids))) == 48
    loss = CLIPStage.loss

    def poisoned(self, params, frozen, batch, rng, *, train):
        value, parts = loss(self, params, frozen, batch, rng, train=train)
        return jnp.where(jnp.isin(batch["id"], ids[3]).any(), jnp.inf, value), parts

    monkeypatch.setattr(CLIPStage, "loss", poisoned)
    config = changed(config, checkpoint__every_steps=2, checkpoint__keep=9)
    assert train.Run(config, str(tmp_path / "skips")).run() == 0
    written = metrics.read(tmp_path / "skips")
    assert written[4]["loss"] == np.inf and written[4]["skipped_steps"] == 1 and written[4]["streak"] == 1
    assert written[4]["param_norm"] == written[3]["param_norm"] != written[5]["param_norm"]
    assert written[6]["skipped_steps"] == 1 and written[6]["streak"] == 0
    assert checkpoint.steps_of(tmp_path / "skips" / "checkpoints") == [6, 2]  # step 4 was bad
    assert "step 4 skipped: loss inf" in caplog.text

    # At the end there is no later step to save: the state before the bad one is, as its own step.
    last = changed(config, total_steps=4, checkpoint__every_steps=100)
    assert train.Run(last, str(tmp_path / "last")).run() == 0
    assert checkpoint.steps_of(tmp_path / "last" / "checkpoints") == [3]
    run = train.Run(last, str(tmp_path / "last"))
    kept = run.begin()
    assert (int(kept.step), int(kept.skipped), int(kept.streak)) == (3, 0, 0)
    norm = float(optax.tree.norm(kept.params))
    assert norm == pytest.approx(metrics.read(tmp_path / "last")[3]["param_norm"], rel=1e-6)

    config = changed(config, max_nonfinite_steps=1)
    with pytest.raises(InputError, match="from step 4 ") as error:
        train.Run(config, str(tmp_path / "stops")).run()
    assert str([int(i) for i in ids[3]]) in str(error.value)
    assert checkpoint.steps_of(tmp_path / "stops" / "checkpoints") == [2]


def test_a_workdir_of_another_run_is_refused_naming_the_keys(config, one_device, tmp_path, caplog):
    workdir = tmp_path / "run"
    configs.claim_workdir(workdir, config)
    other = changed(config, seed=7, optim__learning_rate=0.5, log__every_steps=2)
    with pytest.raises(InputError) as error:
        train.Run(other, str(workdir))
    assert "config.seed: 0 there, 7 here" in str(error.value) and "config.optim.learning_rate" in str(error.value)
    assert "log" not in str(error.value)  # how often it logs is the user's to change
    assert configs.from_json((workdir / "config.json").read_text()).seed == 0
    train.Run(other, str(workdir), accept_changes=True)
    assert "resuming with config.seed=7, which was 0" in caplog.text


def test_other_data_is_refused_naming_what_differs(config, one_device, tmp_path):
    run = train.Run(config, str(tmp_path / "run"))
    data = {**run.input.fingerprint, "examples": 95}
    save_state(run.program, tmp_path / "run", config, data=data)
    with pytest.raises(InputError, match="trained on other input .examples was 95, is 96"):
        train.Run(config, str(tmp_path / "run")).begin()
    state = train.Run(config, str(tmp_path / "run"), accept_changes=True).begin()
    assert int(state.step) == 3


def test_another_clip_at_the_same_place_is_noticed(one_device, tmp_path, data_dir):
    config = small("prior_diffusion", frozen__clip=str(tmp_path / "clip"), data__data_dir=data_dir)
    for seed in (0, 1):
        write(tmp_path, "clip", seed=seed)
        run = train.Run(config, str(tmp_path / "run"))
        if seed == 0:
            save_state(run.program, tmp_path / "run", config, data=run.fingerprint)
            assert int(run.begin().step) == 3
            shutil.rmtree(tmp_path / "clip")
    with pytest.raises(InputError, match="trained on other input .frozen.clip was"):
        run.begin()


@pytest.mark.parametrize("key, value, message", [
    ("evaluation__evaluators", ("los",), "has 'los'; did you mean 'loss'"),
    ("evaluation__evaluators", ("pictures",), "needs 'reconstruct', which this stage does not predict"),
    ("data__eval_split", "valid", r"config.data.eval_split: .*no split 'valid'; .*split='train\[:95%\]'"),
    ("data__workers", 2, "config.data.workers=2"),
    ("data__dataset", "", "config.data.dataset is not set; .*--config.data.dataset=FOLDER"),
])
def test_what_cannot_be_read_or_evaluated_is_found_before_anything_is_written(
    config, one_device, tmp_path, key, value, message
):
    wrong = changed(config, data__cache=True, **{key: value})
    with pytest.raises(InputError, match=message):
        train.Run(wrong, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_a_kill_took_is_made_up_for(config, one_device, tmp_path):
    workdir = tmp_path / "run"
    assert train.Run(config, str(workdir)).run() == 0
    file = workdir / metrics.JSONL
    whole = file.read_text()
    file.write_text("".join(line for line in whole.splitlines(True) if "evaluation/" not in line))
    assert train.Run(config, str(workdir)).run() == 0
    assert file.read_text().splitlines()[-1] == whole.splitlines()[-1]


def test_frozen_networks_are_asked_for_checked_and_read(tmp_path):
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    config = small("prior_diffusion")
    with pytest.raises(InputError, match=r"config.frozen.clip is not set; .*--config.frozen.clip=runs/clip"):
        train.load_frozen(train.build(config, mesh))
    config = small("prior_diffusion", frozen__clip=str(tmp_path))
    with pytest.raises(InputError, match="holds no checkpoint; it should be the workdir of a training run"):
        train.load_frozen(train.build(config, mesh))

    clip = small("clip")
    program = train.build(clip, mesh)
    ema = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(x.dtype), program.state.ema)
    state = zeros(program.state).replace(ema=jax.tree.map(jnp.asarray, ema), step=jnp.int32(9))
    saver = checkpoint.Checkpointer(tmp_path, every_steps=1, keep=1)
    saver.save(state, config=clip)
    saver.close()
    frozen = train.load_frozen(train.build(config, mesh))
    assert jax.tree.all(jax.tree.map(np.array_equal, frozen["clip"], ema))
    other = small("prior_diffusion", frozen__clip=str(tmp_path), clip__text_depth=3)
    with pytest.raises(InputError, match=r"is not config.clip: text_depth=2 there, 3 here"):
        train.load_frozen(train.build(other, mesh))
    # A key that one of them leaves out has its default there.
    assert "text_pool" not in clip.model and clip.model.remat == "none"
    described = {**clip.model.to_dict(), "text_pool": "end", "remat": "full"}
    assert base.clip_differences(there=clip.model, here=described) == []
    apart = base.clip_differences(there=clip.model, here=described | {"text_pool": "last"})
    assert apart == ["text_pool='end' there, 'last' here"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"stage": "prior_difusion"}, "config.stage='prior_difusion' is not a stage; did you mean 'prior_diffusion'"),
        ({"batch_size": 12}, "config.batch_size=12 does not divide over 8 replicas.* the nearest that does is 8"),
        ({"data__split": "train[:0]"}, "is empty"),
        ({"data__split": "trian"}, "no split 'trian'; did you mean 'train'"),
        ({"data__dataset": "/nowhere"}, "'/nowhere' holds no prepared data set"),
        ({"data__variant": "smok"}, "did you mean 'smoke'"),
        ({"model__vocab_size": 100}, "has 2048 entries, the model's vocab_size is 100"),
        ({"mesh__model": 3}, "model=3, which does not divide over the 8 devices"),
        ({"optim__schedule": "cosin"}, "config.optim.schedule='cosin' is unknown; did you mean 'cosine'"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_trace(config, tmp_path, values, sentence):
    with pytest.raises(InputError, match=sentence):
        train.Run(changed(config, **values), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_program_prints_the_sentence_and_exits_with_1(tmp_path, data_dir):
    training = Training(
        tmp_path / "run", steps=5, data_dir=data_dir, cache="", options=("--config.data.split=train[:0]",)
    )
    assert training.wait() == 1
    (line,) = [line for line in training.log.read_text().splitlines() if line.startswith("error: ")]
    assert "is empty" in line
    assert "Traceback" not in training.log.read_text() and not (tmp_path / "run").exists()
