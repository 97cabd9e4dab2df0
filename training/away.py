"""Optional uploads during a run: checkpoints to Hugging Face, metrics to Weights & Biases."""

import subprocess

from configurator import UserError
from system.remote import Metrics, Uploads
from training.checkpoint import checkpoint_name
from training.parallel import FIRST


class Uploader:
    """Uploads checkpoints and metrics in the first rank; does nothing in the others."""

    def __init__(self, settings, is_new):
        """is_new: the run starts at step 0. Raises UserError if the repository cannot be used."""
        self.settings, self.uploads, self.metrics = settings, None, None
        if FIRST and settings.hub_repo:
            private, keep = settings.hub_private, settings.hub_keep_local
            self.uploads = Uploads(settings.hub_repo, settings.out_dir, private, keep, is_new)

    def start_metrics(self, config):
        if FIRST and self.settings.wandb_project:
            names = self.settings.wandb_project, self.settings.wandb_run, self.settings.out_dir
            self.metrics = Metrics(*names, config)

    def upload(self, path, step):
        """Start uploading a new checkpoint."""
        if self.uploads:
            self.uploads.submit(path, checkpoint_name(step))

    def log(self, kind, values):
        if self.metrics:
            self.metrics.log(kind, values)

    def finish(self):
        """Wait for all uploads and return whether they all succeeded."""
        if self.metrics:
            self.metrics.finish()
        return self.uploads is None or self.uploads.finish()

    def wrap_up(self, all_arrived, is_finished):
        """Raise UserError if uploads failed; otherwise run on_finish if the run has finished."""
        if not all_arrived:
            raise UserError(
                f"cannot upload {', '.join(self.uploads.failed)} to {self.uploads.repo}: the files "
                f"are kept in {self.uploads.out_dir}/uploads; use --resume=auto to try again"
            )
        if FIRST and self.settings.on_finish and is_finished:
            print(f"running {self.settings.on_finish!r}", flush=True)
            if status := subprocess.run(self.settings.on_finish, shell=True).returncode:
                raise UserError(f"the on_finish command ended with status {status}")
