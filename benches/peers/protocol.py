"""How a bench worker is talked to: a process that takes one case a line and answers one line of JSON."""
import json, subprocess, sys, time


class Worker:
    """A process that was started with `command`; `ready` is what it said first."""

    def __init__(self, command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self.answer()

    def answer(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit("a bench worker ended early: see its message above")

    def ask(self, case):
        """The answer to `name:size`."""
        self.process.stdin.write(case.replace(":", " ") + "\n")
        self.process.stdin.flush()
        return self.answer()

    def run(self, case):
        return self.ask(case)["seconds"]


def ours(bench):
    """Our side of a comparison."""
    return Worker(["cargo", "bench", "--quiet", "--bench", bench, "--", "--worker"])


def serve(run, **ready):
    """The other end of a `Worker`: answers `run(case, size)`, seconds, until stdin ends."""
    print(json.dumps(dict(ready=True, **ready)), flush=True)
    for line in sys.stdin:
        case, size = (line.split() + ["1"])[:2]
        print(json.dumps(dict(case=case, size=size, seconds=run(case, size))), flush=True)


def timed(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start
