"""How a bench worker is talked to: a process that takes one case a line and answers one line of JSON."""
import json, os, queue, subprocess, sys, threading, time


class Ended(Exception):
    """A worker that ended or was ended, with what it said last."""


class Worker:
    """A process that was started with `command`; `ready` is what it said first. One that says nothing for `patience` seconds is
    ended."""

    def __init__(self, command, env=None, patience=None):
        self.patience, self.lines = patience, queue.Queue()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ, **(env or {})),
            stderr=subprocess.STDOUT if patience else None)
        threading.Thread(target=self.listen, daemon=True).start()
        self.ready = self.answer()

    def listen(self):
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def answer(self):
        said = ""
        while True:
            try:
                line = self.lines.get(timeout=self.patience)
            except queue.Empty:
                self.process.kill()
                raise Ended(f"said nothing for {self.patience:.0f} s") from None
            if line is None:
                raise Ended(said.strip() or f"ended with status {self.process.wait()}")
            if line.startswith("{"):
                return json.loads(line)
            said = line if line.strip() and not line.startswith("note:") else said

    def ask(self, case):
        """The answer to `name:size`."""
        try:
            self.process.stdin.write(case.replace(":", " ") + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said last is read below
        return self.answer()

    def run(self, case):
        return self.ask(case)["seconds"]

    def end(self):
        self.process.kill()
        self.process.wait()


def ours(bench):
    """Our side of a comparison, on the host's cores."""
    return Worker(["cargo", "bench", "--quiet", "--bench", bench, "--", "--worker"], {"VARFT_BENCH_DEVICE": "cpu"})


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
