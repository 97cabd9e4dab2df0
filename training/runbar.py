"""The progress bar of a training run, which counts down even during a long step or evaluation."""

import threading
import time

from system.progress import progress


class RunBar:
    """
    The progress of a run in steps or, with --max_minutes, in seconds of training. state: its
    RunState; n_valid: batches per evaluation.
    """

    def __init__(self, settings, state, n_valid, disable=False):
        self.settings, self.state, self.n_valid = settings, state, n_valid
        self.metrics, self.evaluation = "", ""
        self.step_s, self.eval_s = 0.0, 0.0  # seconds per step and per evaluation
        self.ends_at = None  # estimated end of the run, in time.monotonic()
        total = 60 * settings.max_minutes if settings.max_minutes else settings.max_iters
        self.bar = progress(
            total=total,
            initial=min(total, state.train_s if settings.max_minutes else state.iter_num),
            bar_format="{percentage:3.0f}%|{bar}| {desc}",
            desc=self.text(),
            unit="step",
            dynamic_ncols=True,
            disable=disable,
        )
        self.closed, self.lock = threading.Event(), threading.Lock()
        if not disable:
            threading.Thread(target=self.count_down, daemon=True).start()

    def count_down(self):
        while not self.closed.wait(1.0):
            self.show()

    def show(self):
        with self.lock:
            if not self.closed.is_set():
                self.bar.set_description_str(self.text())

    def text(self):
        of_all = "" if self.settings.max_minutes else f" of {self.settings.max_iters}"
        parts = [f"step {self.state.iter_num}{of_all}", self.evaluation or self.metrics]
        if self.ends_at is not None:
            left = max(0.0, self.ends_at - time.monotonic())
            parts.append(f"{self.bar.format_interval(left)} left")
        return ", ".join(filter(None, parts))

    def step(self, since):
        """Update after a step; since: time.perf_counter() when state.train_s was updated."""
        done = self.state.iter_num
        if self.settings.max_minutes:
            done = self.state.train_s + time.perf_counter() - since
        self.bar.n = min(self.bar.total, done)
        self.bar.set_description_str(self.text(), refresh=False)
        self.bar.update(0)

    def measured(self, loss, step_s, tok_s):
        """Set the latest loss, seconds per step and tokens per second."""
        self.metrics, self.step_s = f"loss {loss:.3f}, {tok_s:,.0f} tok/s", step_s
        self.ends_at = time.monotonic() + self.seconds_left()
        self.show()

    def seconds_left(self):
        """Estimate the seconds for the remaining steps and evaluations from the last ones."""
        interval, step = self.settings.eval_interval, self.state.iter_num
        if self.settings.max_minutes:
            train_s = max(0.0, 60 * self.settings.max_minutes - self.state.train_s)
            last = step + int(train_s / self.step_s)
        else:
            last = self.settings.max_iters
            train_s = max(0, last - step) * self.step_s
        # at each multiple of the interval before the last step, and after the last step
        n_evals = max(0, (last - 1) // interval - (step - 1) // interval) + 1
        # before the first evaluation: a forward pass takes a third of a step
        batch_s = self.step_s / self.settings.gradient_accumulation_steps / 3
        return train_s + n_evals * (self.eval_s or self.n_valid * batch_s)

    def evaluating(self, batches):
        """Yield the batches of an evaluation and show how many are done."""
        start = time.monotonic()
        for i, batch in enumerate(batches, 1):
            self.evaluation = f"evaluation {i} of {self.n_valid}"
            if time.monotonic() - start > 1.0:
                self.show()
            yield batch
        self.evaluation, self.eval_s = "", time.monotonic() - start

    def close(self):
        with self.lock:
            self.closed.set()
            self.bar.set_description_str(self.text(), refresh=False)
            self.bar.close()
