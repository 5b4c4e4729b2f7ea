"""A long run of a tiny training: does it keep its memory, its file handles, its workers?

    python tests/soak.py            # 500 steps, an evaluation every 50, 2 loader workers; about a minute on 2 CPU cores
    python tests/soak.py 5000       # longer

Linux only: it reads /proc, twice a second from the first evaluation on. It ends with status 1 unless: memory grows by
less than 1 MB per 100 steps (resident, training and workers, least squares over the second half: caches are filled by
then); there are no more file handles in the last 100 steps than before step 100 (medians); and afterwards no process is
left, no zombie either.
"""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny  # noqa: E402

MB_PER_100_STEPS = 1.0


def processes_of(session: int) -> list[str]:
    """The processes whose environment names this soak, zombies of the training included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if f"SOAK={session}\0" in (folder / "environ").read_text() or (state == "Z" and int(parent) == session):
                found.append(folder.name)
        except OSError:  # ended meanwhile, or somebody else's
            pass
    return found


def resident(pid: str) -> float:
    """MB, shared pages counted once for each process that has them in use."""
    lines = (Path("/proc") / pid / "smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def main() -> int:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with tempfile.TemporaryDirectory() as folder:
        world, output = tiny.make_world(Path(folder) / "world"), Path(folder) / "run"
        script = Path(__file__).resolve().parents[1] / "05_train.py"
        command = tiny.arguments(world, output, "--max-iters", steps, "--eval-every", 50, "-j", 2, "--print-freq", 10)
        environment = os.environ | {"SOAK": str(os.getpid()), "OMP_NUM_THREADS": "1"}
        training = subprocess.Popen([sys.executable, str(script), *command], env=environment, stdout=subprocess.DEVNULL)
        rows, printed = [], 0
        while training.poll() is None:
            time.sleep(0.5)
            lines = (output / "log.csv").read_text().splitlines() if (output / "log.csv").exists() else []
            step, pids = 10 * (len(lines) - 1), processes_of(os.getpid())
            if step < 50:
                continue
            try:
                rows.append((step, sum(map(resident, pids)), len(os.listdir(f"/proc/{training.pid}/fd")), len(pids)))
            except OSError:  # it ends just now
                continue
            if step >= printed + 50:
                printed = step
                print("step {:5d}  {:7.1f} MB  {:3d} file handles  {} processes".format(*rows[-1]), flush=True)
        deadline = time.monotonic() + 10
        while (left := processes_of(os.getpid())) and time.monotonic() < deadline:
            time.sleep(0.2)
    if not rows:
        print(f"the training ended before step 50 with exit status {training.returncode}")
        return 1
    at, memory, handles, alive = np.array(rows).T
    handles = np.median(handles[at < 100]), np.median(handles[at > steps - 100])  # one more while a file is written
    late = (at >= steps / 2) & (alive == alive.max())
    slope = 100 * np.polyfit(at[late], memory[late], 1)[0]
    print(f"{slope:+.2f} MB per 100 steps, {handles[0]:.0f} file handles at first and {handles[1]:.0f} in the end, "
          f"{len(left)} processes left, exit status {training.returncode}")
    return int(slope > MB_PER_100_STEPS or handles[1] > handles[0] or bool(left) or training.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
