"""What leaves this machine during a run, where the user asks for it: checkpoints and metrics."""

import subprocess

from configurator import UserError
from system.remote import Metrics, Uploads
from training.checkpoint import numbered
from training.parallel import FIRST


class Away:
    """Uploads of checkpoints and metrics of the first rank; in other ranks it does nothing."""

    def __init__(self, settings, is_new):
        """settings: of the run; is_new: it begins at step 0. Raises UserError before training."""
        self.settings, self.uploads, self.metrics = settings, None, None
        if FIRST and settings.hub_repo:
            private, keep = settings.hub_private, settings.hub_keep_local
            self.uploads = Uploads(settings.hub_repo, settings.out_dir, private, keep, is_new)

    def start_metrics(self, config):
        if FIRST and self.settings.wandb_project:
            names = self.settings.wandb_project, self.settings.wandb_run, self.settings.out_dir
            self.metrics = Metrics(*names, config)

    def upload(self, path, step):
        """Begin to upload a new checkpoint."""
        if self.uploads:
            self.uploads.submit(path, numbered(step))

    def log(self, kind, values):
        if self.metrics:
            self.metrics.log(kind, values)

    def finish(self):
        """Wait until everything has left; returns whether it all arrived."""
        if self.metrics:
            self.metrics.finish()
        return self.uploads is None or self.uploads.finish()

    def wrap_up(self, all_arrived, is_finished):
        """Raise UserError unless all has arrived; then run on_finish if the run has finished."""
        if not all_arrived:
            raise UserError(
                f"{', '.join(self.uploads.failed)} did not reach {self.uploads.repo} and lie in "
                f"{self.uploads.out_dir}/uploads: the same command with --resume=auto tries again"
            )
        if FIRST and self.settings.on_finish and is_finished:
            print(f"running {self.settings.on_finish!r}", flush=True)
            if status := subprocess.run(self.settings.on_finish, shell=True).returncode:
                raise UserError(f"the command of on_finish ended with status {status}")
