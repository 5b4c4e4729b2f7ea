"""Stopped, killed, broken, full: does a training lose nothing, and say what happened?

The trainings here are processes of their own that get real signals. They are forked from a server that has imported
torch once (Python's own "forkserver"), so that a start takes no seconds; `ranks` starts them as torchrun would.
"""
import csv
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import golden
import tiny
from tiny import arguments, logged, mutated, read

data = import_module("01_data")
backbone = import_module("02_backbone")
decoder = import_module("04_decoder")
train = import_module("05_train")
infer = import_module("06_infer")

resource = pytest.importorskip("resource", reason="needs the signals and limits of Unix")
if not Path("/proc/self/fd").is_dir():
    pytest.skip("needs Linux: looks into /proc", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = Path(os.environ.get("SHARED_FOLDER", ROOT.parent / "shared")) / "samples"
PATIENCE = 120  # seconds until a process that should end counts as hanging; measured on an idle machine: 0.1 to 3
TWENTY = ("--max-iters", 20, "--eval-every", 4)


# ------------------------------------------------------------------------------------------ trainings to be mistreated

def training(said: Path, argv: list[str], trick, environment: dict) -> None:
    """What a started process does: 05_train with this command line; what it prints goes to the file `said`."""
    os.setsid()  # as torchrun does; so that a signal to its group is none to pytest
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of its loader workers: the server's way would cost seconds
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # as in conftest.py: equal bit for bit
    if trick:
        trick()
    data.run(lambda: train.main(argv))


def still_running(said: Path) -> list[str]:
    """The trainings that print to `said`, or below it, and their loader workers, by number."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found += [folder.name] * os.readlink(folder / "fd" / "1").startswith(str(said))
        except OSError:  # has ended meanwhile, or is none of ours
            pass
    return found


@pytest.fixture(scope="module")
def start():
    """start(said, argv, trick, environment) -> the running process; whatever still runs afterwards is killed."""
    context, running = multiprocessing.get_context("forkserver"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        context.set_forkserver_preload([__name__])

        def starter(said, argv, trick=None, environment=None):
            process = context.Process(target=training, args=(said, argv, trick, environment or {}))
            process.start()
            running.append(process)
            return process

        yield starter
    for process in running:
        process.kill()


def ended(process) -> int:
    """The exit status; a process that does not end fails the test."""
    process.join(PATIENCE)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


def ranks(start, world_size: int, said: Path, argv: list[str], trick=None) -> list:
    """The processes of a torchrun without torchrun, which would end the others when one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(said.with_name(f"{said.name}{rank}"), argv, trick,
                  {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for rank in range(world_size)]


def wait_for_a_step(process, output: Path, rows: int) -> None:
    """Until log.csv has more rows than before, or the process has ended."""
    for _ in range(100 * PATIENCE):
        if not process.is_alive() or ((output / "log.csv").is_file() and len(logged(output)) > rows):
            return
        time.sleep(0.01)
    raise AssertionError("no step is made")


def rows_of(output: Path) -> int:
    """Rows of log.csv that a resumed run keeps."""
    return read(output)["step"] if (output / "last.pt").is_file() else 0


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Log, scores, pictures, both checkpoints with the optimiser: everything bit for bit."""
    assert logged(ours) == logged(theirs)
    assert (ours / "scores.csv").read_text() == (theirs / "scores.csv").read_text()
    for name in sorted(path.name for path in (theirs / "preview").iterdir()):
        assert (ours / "preview" / name).read_bytes() == (theirs / "preview" / name).read_bytes(), name
    for name in ("last.pt", "best.pt"):
        a, b = read(ours, name), read(theirs, name)
        assert (a["step"], a["best"]) == (b["step"], b["best"])
        assert all(torch.equal(a["model"][key], b["model"][key]) for key in b["model"])
        for index, state in b["optimizer"]["state"].items():
            assert all(torch.equal(a["optimizer"]["state"][index][key], state[key]) for key in state)


def messages(*files: Path) -> str:
    """What was said, which is never a traceback, nor a library's warning."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    assert "Traceback" not in text and "Warning" not in text, text
    return text


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """20 steps that nothing disturbs, without workers: what all others are compared with."""
    output = tmp_path_factory.mktemp("whole")
    train.main(arguments(world, output, *TWENTY))
    assert [row["step"] for row in logged(output)] == [str(step) for step in range(1, 21)]
    return output


# --------------------------------------------------------------------------------------------------- stop at any time

def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(world, whole, start, tmp_path):
    """SIGKILL again and again, some time after a first step; workers or not, the run is the same bit for bit.

    The times grow: on a busy machine a run that is always killed in its first second would never reach a checkpoint.
    """
    output, moments, killed = tmp_path / "run", random.Random(0), 0
    while killed < 50:
        resume = ["--resume"] if (output / "last.pt").is_file() else []
        rows = rows_of(output)
        process = start(tmp_path / "said", arguments(world, output, *TWENTY, "-j", 2 * (killed % 2), *resume))
        wait_for_a_step(process, output, rows)
        process.join(moments.uniform(0, 0.8) * 1.4 ** killed)
        process.kill()
        if ended(process) == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
    print(f"killed {killed} times")
    assert killed >= 2
    messages(tmp_path / "said")
    assert_same_run(output, whole)


def die_at(module, function: str, file_of, first=lambda *_: None) -> None:
    """The third time that `function` has to do with last.pt, the process does `first` and is killed."""
    original, calls = getattr(module, function), []

    def dies(*args):
        calls.extend(["last.pt"] * ("last.pt" in str(file_of(*args))))
        if len(calls) == 3:
            first(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    setattr(module, function, dies)


def die_half_written():
    die_at(torch, "save", lambda _, file: file.name, lambda _, file: (file.write(b"PK half a checkpoint"), file.flush()))


def die_before_flush():
    die_at(os, "fsync", lambda number: os.readlink(f"/proc/self/fd/{number}"))


def die_before_rename():
    die_at(os, "replace", lambda old, new: new)


def test_killed_while_it_saves_last_pt_is_the_old_one_and_whole(world, whole, start, tmp_path):
    """Half written, not flushed, not renamed: what is there can be read, and the run goes on from it."""
    output, resume = tmp_path / "run", []
    for trick, step in ((die_half_written, 4), (die_before_flush, 8), (die_before_rename, 12)):
        process = start(tmp_path / "said", arguments(world, output, *TWENTY, *resume), trick)
        assert ended(process) == -signal.SIGKILL
        assert (output / "last.pt.tmp").is_file() and decoder.read_checkpoint(output / "last.pt")["step"] == step
        resume = ["--resume"]
    assert ended(start(tmp_path / "said", arguments(world, output, *TWENTY, *resume))) == 0
    assert_same_run(output, whole)


def ask_for_a_stop_in_an_evaluation():
    """SIGTERM while the first picture of an evaluation is looked at."""
    ladder = decoder.WeCLIP.ladder

    def asks(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return ladder(*args)
    decoder.WeCLIP.ladder = asks


def test_sigterm_and_ctrl_c_save_and_say_how_to_go_on(world, whole, start, tmp_path):
    """Between steps or in an evaluation; Ctrl-C reaches the loader's workers too, which must not mind."""
    output, resume = tmp_path / "run", []
    for send, trick, status in ((os.kill, None, 143), (os.killpg, None, 130), (None, ask_for_a_stop_in_an_evaluation, 143)):
        rows = rows_of(output)
        said = tmp_path / f"said{rows}"
        process = start(said, arguments(world, output, *TWENTY, "-j", 2, *resume), trick)
        if send:
            wait_for_a_step(process, output, rows)
            send(process.pid, signal.SIGTERM if send is os.kill else signal.SIGINT)
        assert ended(process) == status  # so that `05 ... && 06 ...` does not go on
        last = read(output)
        assert last["step"] == len(logged(output)) >= rows
        assert f"stopped after step {last['step']}; go on with:\n" in messages(said)
        assert messages(said).rstrip().endswith(f"05_train.py --resume {shlex.quote(str(output))}")
        resume = ["--resume"]
    assert last["step"] % 4 == 0 and last["evaluated"] < last["step"]  # the evaluation is still to be made
    train.main(arguments(world, output, *TWENTY, "--resume"))
    assert_same_run(output, whole)


# ------------------------------------------------------------------------------------------------------ many processes

def test_two_processes_killed_stopped_and_resumed_end_like_two_that_were_not(world, start, tmp_path):
    """A rank that is killed does not leave the other one hanging; a stop asked of one rank is one of all, at one step."""
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert [ended(process) for process in ranks(start, 2, tmp_path / "w", arguments(world, whole, *TWENTY))] == [0, 0]

    processes = ranks(start, 2, tmp_path / "k", arguments(world, output, *TWENTY))
    while processes[1].is_alive() and not (output / "last.pt").is_file():
        time.sleep(0.01)
    processes[1].kill()
    began = time.monotonic()
    assert ended(processes[0]) == 2
    print(f"the other one ended after {time.monotonic() - began:.1f} s")
    assert "process 0: another process of the run has ended" in messages(tmp_path / "k0")

    command = arguments(world, output, *TWENTY, "--resume", "-j", 1)
    rows = rows_of(output)
    processes = ranks(start, 2, tmp_path / "s", command)
    wait_for_a_step(processes[0], output, rows)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [ended(process) for process in processes] == [0, 143]
    assert f"stopped after step {rows_of(output)};" in messages(tmp_path / "s0", tmp_path / "s1")

    assert [ended(process) for process in ranks(start, 2, tmp_path / "e", command)] == [0, 0]
    messages(tmp_path / "e0", tmp_path / "e1")
    assert_same_run(output, whole)


def test_torchrun_told_to_stop_saves_on_all_ranks(world, tmp_path):
    """torchrun hands SIGTERM to the process group of each rank, loader workers included, and waits 30 seconds."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "05_train.py"),
               *arguments(world, output, "--max-iters", 10_000, "--eval-every", 10_000, "-j", 1)]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, cwd=tmp_path)
    while process.poll() is None and not ((output / "log.csv").is_file() and len(logged(output)) > 2):
        time.sleep(0.1)
    process.terminate()
    process.wait(PATIENCE)
    text = (tmp_path / "said").read_text()
    assert "stopped after step" in text and "error:" not in text and "FutureWarning" not in text, text
    assert read(output)["step"] == len(logged(output))


def poison():
    """From the fourth step on the loss is not a number."""
    losses = decoder.WeCLIPPlus.losses
    decoder.WeCLIPPlus.losses = lambda *a: {name: loss * (float("nan") if a[-1] >= 3 else 1) for name, loss in losses(*a).items()}


def test_a_loss_that_is_not_finite_stops_all_processes_and_names_their_images(world, start, tmp_path):
    """Each process names its own; the last good checkpoint is left as it was."""
    output = tmp_path / "run"
    argv = arguments(world, output, "--max-iters", 6, "--eval-every", 2)
    assert [ended(process) for process in ranks(start, 2, tmp_path / "said", argv, poison)] == [2, 2]
    info = data.dataset_info(str(world))
    views = train.TrainDataset(data.list_samples(info, world, "train"), info.num_classes, 64)
    for rank, draws in enumerate(((12, 13), (14, 15))):
        names = ", ".join(views[draw]["name"] for draw in draws)
        assert f"process {rank}: step 3: the loss is nan; images of the batch: {names}." in messages(tmp_path / f"said{rank}")
    last = read(output)
    assert last["step"] == 2 and all(weight.isfinite().all() for weight in last["model"].values())


def test_weights_that_are_not_finite_are_never_saved(world, tmp_path, monkeypatch):
    """A gradient may overflow under a finite loss; the next checkpoint must not replace the last good one."""
    def broken_step(method, *_):
        next(method.model.parameters()).data[:] = float("inf")
        return dict.fromkeys(("seg", "aff", "mutual_clip", "mutual_dino", "dice", "total"), 1.0)
    train.main(arguments(world, tmp_path, "--max-iters", 1))
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(train, "train_step", broken_step)
    with pytest.raises(data.DataError, match="step 2: weights are not finite any more, .*last.pt is left as it was"):
        train.main(arguments(world, tmp_path, "--max-iters", 2, "--resume"))
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_picture_that_breaks_is_passed_over_by_all_runs_alike(world, start, tmp_path):
    """One broken file of thousands is no reason to stop. It is named by the process that met it; the next picture of the epoch
    is shown in its place, in one process and in two, so that runs stay the same."""
    copy = shutil.copytree(world, tmp_path / "copy")
    info = data.dataset_info(str(copy))
    views = train.TrainDataset(data.list_samples(info, copy, "train"), info.num_classes, 64)
    victim = Path(views.samples[train.epoch_order(0, 0, 8)[6]].image)  # the 7th draw: rank 1 in the second step
    victim.write_bytes(victim.read_bytes()[:300])
    argv = arguments(copy, tmp_path / "two", "--max-iters", 2, "-j", 1)
    assert [ended(process) for process in ranks(start, 2, tmp_path / "said", argv)] == [0, 0]
    assert f"passed over: {victim}: cannot be read as a picture" in messages(tmp_path / "said1")
    assert "passed over" not in messages(tmp_path / "said0")

    assert ended(start(tmp_path / "alone", arguments(copy, tmp_path / "one", "--max-iters", 2, "-b", 4, "-j", 1))) == 0
    said = messages(tmp_path / "alone")
    assert said.count(str(victim)) == 1 and "1 training pictures were passed over" in said
    batch = [train.TrainDataset(views.samples, 4, 64)[draw] for draw in (6, 7)]
    assert batch[0]["name"] == batch[1]["name"] and not batch[1]["broken"]


def test_too_many_broken_pictures_stop_the_run_and_no_step_is_lost(world, tmp_path):
    """More than ten, and more than one in a hundred: that is no accident any more."""
    copy = shutil.copytree(world, tmp_path / "copy")
    lines = []
    for number in range(40):
        (copy / "images" / f"broken{number}.png").write_bytes(b"no picture")
        lines.append(f"broken{number}.png,cat,train")
    for number in range(40):
        shutil.copy(copy / "images" / "0.png", copy / "images" / f"fine{number}.png")
        lines.append(f"fine{number}.png,cat,train")
    (copy / "labels.csv").write_text("\n".join([(world / "labels.csv").read_text(), *lines]))
    with pytest.raises(data.DataError, match="1[1-9] of 88 training pictures cannot be used"):
        train.main(arguments(copy, tmp_path / "run", "--max-iters", 40))
    assert read(tmp_path / "run")["step"] > 0


def test_a_run_needs_no_more_than_its_folder_to_go_on(world, whole, tmp_path, monkeypatch):
    """What it was told lies in its checkpoint, from any folder; what is told again must agree, and too few steps are refused."""
    output = tmp_path / "run"
    monkeypatch.setattr(train.StopRequest, "requested", property(lambda self: (output / "last.pt").exists()))
    train.main(arguments(world, output, *TWENTY))
    monkeypatch.undo()
    step = read(output)["step"]
    assert 0 < step < 20
    monkeypatch.chdir(tmp_path)
    for told, message in ((["--lr", "0.5"], "lr is 0.002, this run has 0.5"), (["shapes"], "dataset is folder, this run has shapes"),
                          (["--max-iters", "2"], f"has made {step} steps already, more than --max-iters 2")):
        with pytest.raises(data.DataError, match=message):
            train.main([*told, "--resume", str(output), "--device", "cpu"])
    train.main(["--resume", str(output), "-j", "0", "--device", "cpu", "--print-freq", "1"])
    assert_same_run(output, whole)


def test_two_trainings_never_share_a_folder(world, start, tmp_path):
    """Started at the same moment with the same folder: one is refused. By default each takes one of its own."""
    argv = arguments(world, tmp_path / "run", "--max-iters", 30)
    both = [start(tmp_path / f"said{number}", argv) for number in range(2)]
    assert sorted(ended(process) for process in both) == [0, 2]
    assert "run belongs to a training that is running; choose another --output-dir" in messages(tmp_path / "said0", tmp_path / "said1") or (
        "run holds a run already" in messages(tmp_path / "said0", tmp_path / "said1"))
    where = argv.index("--output-dir")
    both = [start(tmp_path / f"home{number}", argv[:where] + argv[where + 2:], partial(os.chdir, tmp_path)) for number in range(2)]
    assert [ended(process) for process in both] == [0, 0]
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == [f"{world.name}-weclip+", f"{world.name}-weclip+-2"]
    assert all([row["step"] for row in logged(run)] == [str(step) for step in range(1, 31)] for run in runs)


def test_a_long_tmpdir_is_no_matter(world, start, tmp_path):
    """Job systems have such; tensors that go by sockets in it hung the run for ever."""
    deep = tmp_path / "scratch_of_the_job_system" / "user_0123456789" / "job_0123456789_array_0042_node_0007_partition_gpu_long"
    deep.mkdir(parents=True)
    process = start(tmp_path / "said", arguments(world, tmp_path / "run", "--max-iters", 3, "-j", 2), None, {"TMPDIR": str(deep)})
    assert ended(process) == 0
    messages(tmp_path / "said")


def give_no_batch():
    """Each loader worker stands still at its first picture."""
    train.TrainDataset.__getitem__ = lambda *_: time.sleep(1000)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_is_obeyed_while_a_batch_is_waited_for(world, start, tmp_path, workers):
    """A worker that hangs must not keep a run from ending; what it has learned is saved."""
    output, said = tmp_path / "run", tmp_path / "said"
    process = start(said, arguments(world, output, "--max-iters", 9, "-j", workers), give_no_batch)
    while process.is_alive() and not (output / "preview" / "step_000000.png").exists():
        time.sleep(0.05)
    time.sleep(1)
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process) == 143
    assert "stopped after step 0; go on with" in messages(said) and read(output)["step"] == 0


def test_a_worker_that_is_killed_stops_the_run_with_a_reason(world, start, tmp_path):
    """As the kernel does when memory runs out. No checkpoint is lost."""
    output, said = tmp_path / "run", tmp_path / "said"
    process = start(said, arguments(world, output, "--max-iters", 10_000, "--eval-every", 10_000, "-j", 1))
    wait_for_a_step(process, output, 0)
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    assert ended(process) == 2
    assert "a loader process died; if memory ran out, take fewer with -j" in messages(said)


def let_a_server_start_the_workers():
    """As Python 3.14 does on Linux."""
    multiprocessing.set_start_method("forkserver", force=True)


@pytest.mark.parametrize("trick", [None, let_a_server_start_the_workers])
def test_no_worker_outlives_a_training_that_is_killed(world, start, tmp_path, trick):
    """However the workers were started. They would keep their memory until somebody looks."""
    output, said = tmp_path / "run", tmp_path / "said"
    process = start(said, arguments(world, output, "--max-iters", 10_000, "--eval-every", 10_000, "-j", 2), trick)
    wait_for_a_step(process, output, 0)
    assert len(still_running(said)) >= 3
    process.kill()
    ended(process)
    for _ in range(10 * PATIENCE):
        if not still_running(said):
            return
        time.sleep(0.1)
    raise AssertionError(f"left over: {still_running(said)}")


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_evaluation_counts_each_image_once_for_any_number_of_processes(world, whole, world_size, monkeypatch):
    """4 pictures among 2, 3 and 5 processes: the sum of their confusion matrices is that of one."""
    method = decoder.restore(read(whole), "last.pt", {}, "cpu")
    samples = data.list_samples(method.info, world, "val")

    def matrices(rank, size):
        found = []
        monkeypatch.setattr(train, "rank_and_world", lambda: (rank, size))
        monkeypatch.setattr(train, "sum_over_processes", lambda x: found.append(x) or x)
        train.evaluate(method, samples)
        return torch.stack(found)

    shares = [matrices(rank, world_size) for rank in range(world_size)]
    expected = matrices(0, 1)
    assert torch.equal(sum(shares), expected)
    assert expected.sum(dim=(1, 2)).tolist() == [4 * 84 * 70] * 4


# ---------------------------------------------------------------------------------------------------------- full disks

@pytest.fixture
def small_disk():
    """small_disk(n): no file can grow beyond n bytes any more, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room, file, rows", [(1_000_000, "last.pt", 3), (100, "args.json", 1)])
def test_a_full_disk_leaves_the_old_files_whole_and_says_so(world, tmp_path, small_disk, room, file, rows):
    """Room for the log and not for a checkpoint; room for nothing, which shows before the first step."""
    train.main(arguments(world, tmp_path, "--max-iters", 1))
    before = {name: (tmp_path / name).read_bytes() for name in ("last.pt", "best.pt", "scores.csv")}
    small_disk(room)
    with pytest.raises(data.DataError, match=f"{file} could not be written .*before is intact. Free some space"):
        train.main(arguments(world, tmp_path, "--max-iters", 3, "--resume"))
    small_disk(resource.RLIM_INFINITY)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert len(logged(tmp_path)) == rows and not list(tmp_path.glob("*.tmp"))
    train.main(arguments(world, tmp_path, "--max-iters", 3, "--resume"))
    assert [row["step"] for row in logged(tmp_path)] == ["1", "2", "3"] and read(tmp_path)["step"] == 3


def test_a_full_disk_at_a_line_of_the_log_names_the_log(tmp_path, small_disk):
    """The first thing to fail may be the smallest one; the table from before stays whole, and is gone on with."""
    log = train.Log(tmp_path / "log.csv", 0)
    small_disk(len("step,total\n") + 2 * len("8,0.123456\n") + 1)
    with pytest.raises(data.DataError, match="log.csv could not be written"):
        for step in (8, 9, 10):
            log.write(step=step, total=0.123456)
    small_disk(resource.RLIM_INFINITY)
    assert (tmp_path / "log.csv").read_text() == "step,total\n8,0.123456\n9,0.123456\n"
    train.Log(tmp_path / "log.csv", 9).write(step=10, total=7)
    with open(tmp_path / "log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["8", "9", "10"]


@pytest.mark.parametrize("refused", [3, 99])
def test_a_file_that_another_program_holds_is_waited_for(tmp_path, monkeypatch, refused):
    """As on Windows. For about a second; then the new one is kept beside it, and named."""
    real, calls, waited = os.replace, [], []

    def replace(old, new):
        calls.append(new)
        if len(calls) <= refused:
            raise PermissionError(13, "is being used by another process")
        real(old, new)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", waited.append)
    path = tmp_path / "last.pt"
    path.write_text("old")
    if refused == 3:
        data.write_text(path, "new")
    else:
        with pytest.raises(data.DataError, match="last.pt could not be replaced .*; the new file is kept as .*last.pt.tmp"):
            data.write_text(path, "new")
    assert [path.read_text(), *(p.read_text() for p in tmp_path.glob("*.tmp"))] == (["new"] if refused == 3 else ["old", "new"])
    assert sum(waited) <= 1.1


@pytest.mark.parametrize("end", [OSError(28, "No space left on device"), RuntimeError("unexpected pos"), KeyboardInterrupt()])
def test_whatever_ends_a_writing_no_half_file_stays(tmp_path, end):
    (tmp_path / "a.png").write_text("old")

    def write(file):
        file.write(b"half")
        raise end
    with pytest.raises(KeyboardInterrupt if isinstance(end, KeyboardInterrupt) else data.DataError):
        data.write_whole(tmp_path / "a.png", write)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_an_output_directory_that_cannot_be_is_refused_before_the_first_step(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(OSError, match="file"):  # 01_data.run prints it without a traceback
        train.main(arguments(world, tmp_path / "file" / "run", "--max-iters", 1))


# ------------------------------------------------------------------------------------------------------------ refusals

@pytest.fixture(scope="module")
def one_step(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("one step")
    train.main(arguments(world, output, "--max-iters", 1))
    return output


def other_weights(world, tmp_path):
    """Weights of the same sizes with other numbers, and the same ones under another name."""
    torch.save(golden.clip_state_dict(tiny.CLIP, seed=8), tmp_path / "clip2.pt")
    torch.save(golden.dino_state_dict(golden.DINO_LAYOUTS["tiny"], seed=8), tmp_path / "dino2.pth")
    shutil.copy(world / "clip.pt", tmp_path / "moved.pt")


@pytest.mark.parametrize("options, message", [
    (["--method", "weclip"], r"method is weclip\+, this run has weclip"),
    (["--background", "sky"], r"background is \[.*'grass'.*\], this run has \['sky'\]"),
    (["--clip", "clip2.pt"], r"clip is .*clip.pt.*, this run has .*clip2.pt"),
    (["--dino", "dino2.pth"], r"dino is .*dino.pth.*, this run has .*dino2.pth"),
    (["--split", "val"], r"split is train, this run has val; samples is 8 images.*, this run has 4 images"),
    (["--crop-size", "32"], "crop_size is 64, this run has 32"), (["-b", "4"], "batch_size is 2, this run has 4"),
    (["--lr", "0.1"], "lr is 0.002, this run has 0.1"), (["--seed", "1"], "seed is 0, this run has 1"),
    (["--masks", "truth"], "masks is None, this run has truth"), (["--amp"], "amp is False, this run has True")])
def test_a_run_is_not_continued_with_other_settings(world, one_step, tmp_path, monkeypatch, options, message):
    """It would go on as neither the one nor the other; both sides are named."""
    monkeypatch.chdir(tmp_path)
    other_weights(world, tmp_path)
    with pytest.raises(data.DataError, match=f"last.pt: .*{message}.*Resume with the same settings"):
        train.main(arguments(world, one_step, "--max-iters", 2, "--resume", *options))


def test_a_run_is_continued_for_longer_and_with_its_weights_elsewhere(world, one_step, tmp_path):
    """What changes no step: how long it lasts, how often it is scored, where the same frozen weights lie."""
    other_weights(world, tmp_path)
    train.main(arguments(world, tmp_path / "on", "--resume", one_step / "last.pt", "--max-iters", 2, "--eval-every", 1,
                         "--clip", tmp_path / "moved.pt"))
    assert read(tmp_path / "on")["step"] == 2


def relabelled(world, folder: Path, old: str, new: str) -> Path:
    """A copy of the world with a change in its table."""
    copy = shutil.copytree(world, folder)
    (copy / "labels.csv").write_text((copy / "labels.csv").read_text().replace(old, new))
    return copy


def test_the_data_of_others_is_refused(world, one_step, tmp_path):
    """Another class list on resuming, other classes under --data-path, another data set's folder: both sides named."""
    dogs = relabelled(world, tmp_path / "dogs", "cat", "dog")
    with pytest.raises(data.DataError, match=r"classes is \['cat', .*\], this run has \['dog', "):
        train.main(arguments(dogs, one_step, "--max-iters", 2, "--resume"))
    sofas = relabelled(world, tmp_path / "sofas", "6.png,cat", "6.png,sofa")
    with pytest.raises(data.DataError, match=r"samples is 8 images, check sum \w+, this run has 8 images, check sum \w+\."):
        train.main(arguments(sofas, one_step, "--max-iters", 2, "--resume"))
    for name, message in ((str(world), "unknown class 'dog'; wanted one of cat, sofa, tree house"),
                          ("shapes", "unknown class '.*'; wanted one of boat, butterfly"), ("voc", "no voc data in .*dogs"),
                          ("coco", "no images of train in .*dogs: neither train2014/")):
        with pytest.raises(data.DataError, match=message):
            train.main([name, *arguments(dogs, tmp_path / "run", "--clip", world / "clip.pt", "--data-path", dogs)[1:]])


def test_inference_names_both_backbones_that_differ(world, one_step, tmp_path):
    other_weights(world, tmp_path)
    with pytest.raises(data.DataError, match=r"best.pt: trained on another clip than .*clip2.pt \(\w+\): on .*clip.pt \(\w+\)"):
        infer.main([str(one_step / "best.pt"), "x.png", "--clip", str(tmp_path / "clip2.pt"), "--device", "cpu"])


@pytest.mark.parametrize("options, message", [
    (["--crop-size", "72"], "--crop-size 72 is no multiple of the patch of .*clip.pt, 16 pixels; take 64 or 80"),
    (["--crop-size", "8"], "take 16 or 16"),
    (["-b", "9"], "8 images with a class in train, but 9 in a batch")])
def test_numbers_that_do_not_go_together_are_refused(world, tmp_path, options, message):
    with pytest.raises(data.DataError, match=message):
        train.main(arguments(world, tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options, message", [
    (["-b", "0"], "wanted a whole number from 1 to"), (["--max-iters", "few"], "invalid int value"), (["-j", "-1"], "from 0 to 256"),
    (["--print-freq", "0"], "from 1 to"), (["--seed", "-1"], "from 0 to"), (["--seed", str(2**70)], "from 0 to 1000000000"),
    (["-j", "many"], "'many': wanted"), (["-j", "999"], "from 0 to 256"), (["--box-fraction", "x"], "'x': wanted none, or a number")])
def test_numbers_that_make_no_sense_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["shapes", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options, message", [
    (["--max-iters", "0"], "--max-iters 0: wanted a number above 0"), (["--eval-every", "-1"], "--eval-every -1: wanted"),
    (["--lr", "nan"], "--lr nan: wanted"), (["--lr", "0"], "--lr 0.0: wanted"), (["--scales", "1", "-1"], "--scales -1.0: wanted"),
    (["--box-fraction", "-0.5"], "--box-fraction -0.5: wanted a number that is not negative"),
    (["--cam-skip", "9"], "--cam-skip 9: .* has 2 blocks before its last"), (["--fuse-blocks", "3"], "--fuse-blocks 3"),
    (["--device", "meta"], "--device meta: ")])
def test_numbers_of_a_row_that_make_no_sense_are_named(world, tmp_path, options, message):
    with pytest.raises(data.DataError, match=message):
        train.main(arguments(world, tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("CUDA out of memory. Tried"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), OSError(12, "Cannot allocate memory")])
def test_too_little_memory_is_one_sentence_with_the_mend(error, world, tmp_path, capsys, monkeypatch):
    """In the words of each device, from any command; a training says too how to go on."""
    def fails(*_):
        raise error
    with pytest.raises(SystemExit) as status:
        data.run(fails)
    said = capsys.readouterr().err
    assert status.value.code == 2 and said.startswith("error: not enough memory; take a smaller --long-side") and said.count("\n") == 1
    if not isinstance(error, OSError):
        monkeypatch.setattr(train, "run", fails)
        with pytest.raises(data.DataError, match="process 0: not enough memory; .* go on with --resume"):
            train.main(arguments(world, tmp_path / "run"))


def test_an_error_of_our_own_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        data.run(lambda: 1 / 0)


@pytest.mark.parametrize("environment, message", [
    ({"RANK": "0"}, "has RANK, but not LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: .*`unset RANK`"),
    ({"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "but not MASTER_ADDR, MASTER_PORT"),
    ({"LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "taken"}, "cannot meet at 127.0.0.1:.*in use"),
    ({"LOCAL_RANK": "0", "WORLD_SIZE": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "cannot meet at")])
def test_an_environment_of_no_torchrun_is_refused(environment, message, monkeypatch):
    """A job system or an earlier shell leaves such things behind."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"RANK": "0"} | environment).items():
            monkeypatch.setenv(name, str(taken.getsockname()[1]) if value == "taken" else value)
        with pytest.raises(data.DataError, match=message):
            train.start_processes("cpu")


def test_loader_processes_that_cannot_start_are_named(world, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(11, "Resource temporarily unavailable")
    monkeypatch.setattr(train, "DataLoader", refuse)
    with pytest.raises(data.DataError, match="no loader process could be started .*unavailable.*; -j 0 does without them"):
        train.main(arguments(world, tmp_path / "run", "-j", 1))


def test_a_validation_picture_that_cannot_be_scored_is_named_and_stops_nothing(world, tmp_path, capsys):
    """It is read hours after the start. The scores are those of the others."""
    copy = shutil.copytree(world, tmp_path / "copy")
    data.save_mask(copy / "masks" / "9.png", np.full((84, 70), 77, np.uint8))
    train.main(arguments(copy, tmp_path / "run", "--max-iters", 1))
    assert "9.png: values [77] are no class; wanted 0..3" in capsys.readouterr().out
    lines = (copy / "labels.csv").read_text().splitlines()
    (copy / "labels.csv").write_text("\n".join(line for line in lines if not line.startswith("9.png")))
    train.main(arguments(copy, tmp_path / "without", "--max-iters", 1))
    assert (tmp_path / "run" / "scores.csv").read_text() == (tmp_path / "without" / "scores.csv").read_text()


# ---------------------------------------------------------------------------------------------- broken and hostile input

class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "pickle was trusted"))


@pytest.mark.parametrize("load", [decoder.read_checkpoint, backbone.load_clip, backbone.load_dino])
@pytest.mark.parametrize("form", ["zip", "old", "TorchScript"])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # OpenAI's form is an old one
def test_no_file_of_weights_can_run_code(tmp_path, load, form):
    """torch.load trusts a file unless told not to; a file that poses as TorchScript must not get around that."""
    path = tmp_path / "weights.pt"
    torch.save({"model": Bomb(tmp_path / "harm")}, path, _use_new_zipfile_serialization=form != "old")
    if form == "TorchScript":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("weights/code/__torch__.py", "")
    with pytest.raises(data.DataError, match="weights.pt: not a") as refusal:
        load(str(path))
    assert not (tmp_path / "harm").exists()
    assert "weights_only" not in str(refusal.value)  # torch advises to trust it


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_torchscript_archive_that_is_not_openais_is_never_loaded(world, one_step, tmp_path, monkeypatch):
    """Its own code would run, and a checkpoint of others may name it as its CLIP. It is told by its SHA-256 before that."""
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("loaded"))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "acts.pt")
    with pytest.raises(data.DataError, match="acts.pt: .* a TorchScript archive that is not OpenAI's by its SHA-256"):
        backbone.load_clip(str(tmp_path / "acts.pt"))
    checkpoint = read(one_step)
    checkpoint["config"]["clip"] = str(tmp_path / "acts.pt")
    torch.save(checkpoint, tmp_path / "foreign.pt")
    with pytest.raises(data.DataError, match="acts.pt: .*SHA-256"):
        infer.main([str(tmp_path / "foreign.pt"), "x.png"])


def test_mutated_checkpoints_are_refused_or_read_right(tmp_path):
    """300 files with bytes changed, cut or doubled (fixed seeds): what is read at all is what was written."""
    path, two = tmp_path / "last.pt", ["cat", "sofa"]
    entries = {"step": 3, "config": {"depth": 3}, "method": "weclip", "dataset": "voc", "classes": two, "prompts": two,
               "background": two, "frozen": {"clip": {"name": "x"}}}
    entries["model"] = {f"layer{n}": torch.randn(40, generator=torch.Generator().manual_seed(n)) for n in range(20)}
    torch.save(entries, path)
    contents, refused = path.read_bytes(), 0
    expected = str({key: value.tolist() for key, value in entries.pop("model").items()}), entries
    for seed in range(300):
        path.write_bytes(mutated(contents, seed))
        try:
            found = decoder.read_checkpoint(path)
        except data.DataError:
            refused += 1
            continue
        assert (str({key: value.tolist() for key, value in found.pop("model").items()}), found) == expected
    assert 200 < refused < 300


@pytest.mark.parametrize("change", [
    lambda c: c["config"].update(unheard_of=1), lambda c: c["model"].clear(),
    lambda c: c["model"].update({"decoder.linear_pred.bias": torch.zeros(2)}), lambda c: c["frozen"].clear(),
    lambda c: c["frozen"]["clip"].clear(), lambda c: c["config"].update(depth="deep"), lambda c: c["classes"].append("dog")])
def test_a_checkpoint_that_contradicts_itself_is_refused(world, one_step, change):
    """Nothing that torch says of it reaches the user as a traceback."""
    checkpoint = read(one_step)
    change(checkpoint)
    with pytest.raises(data.DataError):
        decoder.restore(checkpoint, "last.pt", {"clip": str(world / "clip.pt"), "dino": str(world / "dino.pth")}, "cpu")


NAN = float("nan")


def change(where: str, value, checkpoint: dict) -> None:
    *folders, key = where.split("/")
    for folder in folders:
        checkpoint = checkpoint[folder]
    checkpoint[key] = value


@pytest.mark.parametrize("where, value", [
    ("step", -5), ("step", 10**12), ("step", True), ("step", 1.0), ("step", None), ("dataset", "unheard of"), ("dataset", 3),
    ("classes", ["cat", "sofa"]), ("classes", []), ("classes", [1, 2, 3]), ("prompts", "cat"), ("prompts", []), ("background", [1]),
    ("classes", None), ("frozen", {"clip": "x"}), ("frozen", {"clip": {"name": 3}}), ("frozen", []), ("method", 3), ("model", [1]),
    ("model", {5: torch.zeros(1)}), ("model", {"a": 1}), ("config", 1), ("config/depth", 10**7), ("config/depth", "3"),
    ("config/scales", ()), ("config/scales", (-1.0,)), ("config/scales", (NAN,)), ("config/long_side", "64"),
    ("config/crop_size", 10**6), ("config/decay", None), ("config/unheard_of", 1), ("config/lr", True), ("evaluated", "x"),
    ("evaluated", 2), ("best", 3), ("best", NAN), ("best", "x"), ("optimizer", 1), ("optimizer", {}), ("seed", "x"), ("masks", 1),
    ("split", torch.zeros(2)), ("amp", "no"), ("samples", torch.zeros(2)), ("command", []), ("command", {}),
    ("command/seed", 2**70), ("command/seed", True), ("command/background", "sky"), ("command/dataset", 1)])
def test_a_checkpoint_with_impossible_values_is_refused_by_name(one_step, tmp_path, where, value):
    """By both commands, before anything is made of them."""
    checkpoint = read(one_step)
    change(where, value, checkpoint)
    torch.save(checkpoint, tmp_path / "last.pt")
    for main, argv in ((infer.main, [str(tmp_path / "last.pt"), "x.png"]), (train.main, ["--resume", str(tmp_path)])):
        with pytest.raises(data.DataError, match=f"last.pt: .*({where.replace('/', '|')})"):
            main([*argv, "--device", "cpu"])


@pytest.mark.parametrize("broken", ["weight", "moment", "shape", "missing"])
def test_weights_and_moments_that_are_no_numbers_are_refused(one_step, world, tmp_path, broken):
    checkpoint = read(one_step)
    state = checkpoint["optimizer"]["state"][0]
    if broken == "weight":
        next(iter(checkpoint["model"].values())).fill_(NAN)
    elif broken == "moment":
        state["exp_avg"].fill_(NAN)
    elif broken == "shape":
        state["exp_avg_sq"] = torch.zeros(2)
    else:
        del state["exp_avg"]
    torch.save(checkpoint, tmp_path / "last.pt")
    with pytest.raises(data.DataError, match="last.pt: does not fit this run"):
        train.main(["--resume", str(tmp_path), "--max-iters", "2", "-j", "0", "--device", "cpu"])
    if broken == "weight":
        with pytest.raises(data.DataError, match="last.pt: .*some are not finite"):
            infer.main([str(tmp_path / "last.pt"), "x.png", "--device", "cpu"])


def test_a_checkpoint_of_a_shorter_form_cannot_be_resumed(world, one_step, tmp_path):
    """Without the optimiser it can be used for pictures, not to go on."""
    checkpoint = read(one_step)
    del checkpoint["optimizer"]
    torch.save(checkpoint, tmp_path / "last.pt")
    with pytest.raises(data.DataError, match="last.pt: does not fit this run"):
        train.main(arguments(world, tmp_path, "--max-iters", 2, "--resume"))


def test_a_checkpoint_of_before_is_refused_in_one_sentence(one_step, tmp_path):
    """It named its backbones as `clip` and `dino` and its numbers otherwise."""
    checkpoint = read(one_step)
    checkpoint |= checkpoint.pop("frozen")
    torch.save(checkpoint, tmp_path / "old.pt")
    with pytest.raises(data.DataError, match="old.pt: made by an earlier version of this project; use it with that version, or"):
        infer.main([str(tmp_path / "old.pt"), "x.png"])
    with pytest.raises(data.DataError, match="old.pt: made by an earlier version of this project"):
        train.main(["--resume", str(tmp_path / "old.pt")])


def test_a_training_on_odd_pictures_works(tmp_path, world):
    """One pixel, one row, one column, odd sizes, and pictures without any class, which are skipped and counted."""
    copy = shutil.copytree(world, tmp_path / "copy")
    lines = []
    for number, (height, width) in enumerate(((1, 1), (1, 500), (500, 1), (83, 65), (7, 9))):
        Image.fromarray(np.full((height, width, 3), 30 * number, np.uint8)).save(copy / "images" / f"odd{number}.png")
        data.save_mask(copy / "masks" / f"odd{number}.png", np.full((height, width), number % 4, np.uint8))
        lines.append(f"odd{number}.png,{'cat' if number < 4 else ''},{'val' if number < 2 else 'train'}")
    (copy / "labels.csv").write_text("\n".join([(world / "labels.csv").read_text(), *lines]))
    train.main(arguments(copy, tmp_path / "run", "--max-iters", 5))
    settings = (tmp_path / "run" / "args.json").read_text()
    assert read(tmp_path / "run")["step"] == 5 and "1 without a foreground class" in settings


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no real samples; SHARED_FOLDER=... says where")
def test_real_awkward_files_are_trained_on_and_segmented_or_named(world, one_step, tmp_path, capsys):
    """57 files from other projects' collections: those that Pillow reads make a training; a folder of all is done but
    for the others, which are named."""
    with open(SAMPLES / "awkward" / "index.csv", encoding="utf-8") as file:
        good = {row["file"]: row["pillow_result"] == "ok" for row in csv.DictReader(file)}
    folder = tmp_path / "awkward"
    (folder / "cat").mkdir(parents=True)
    (folder / "sofa").mkdir()
    for number, name in enumerate(name for name, fine in good.items() if fine and not name.endswith(".mpo")):
        shutil.copy(SAMPLES / "awkward" / name, folder / ("cat", "sofa")[number % 2])
    count = len(list(folder.glob("*/*")))
    train.main([str(folder), *arguments(world, tmp_path / "run", "--max-iters", -(-count // 8), "-b", 8)[1:]])
    assert read(tmp_path / "run")["step"] == -(-count // 8)

    pictures = shutil.copytree(SAMPLES / "awkward", tmp_path / "all")
    with pytest.raises(SystemExit) as status:
        data.run(lambda: infer.main([str(one_step / "best.pt"), str(pictures), "--device", "cpu", "--scales", "1", "--no-flip"]))
    errors = capsys.readouterr().err
    assert status.value.code == 1
    for name, fine in good.items():
        if not name.endswith(".mpo"):  # no suffix of a picture
            assert fine or f"{name}: cannot be read" in errors, name
