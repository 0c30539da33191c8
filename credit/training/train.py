"""The training loop: the same loss curve on every mesh, resumed by running the same command again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from credit.data.dataset import Fields, StepDataset
from credit.data.loading import BatchLoader
from credit.data.sampler import DataParallelSampler
from credit.domain_parallel.generators import seed_torch
from credit.errors import ConfigError, CreditError, Stopped
from credit.launch.contract import enforce_sampler_contract
from credit.launch.job import Job, sole_writer
from credit.launch.precision import in_words
from credit.parallel.checkpoint import Checkpointer, newest_good_checkpoint
from credit.parallel.collectives import all_sum, clip_grad_norm_, gather_objects, local, scale_gradients, together
from credit.parallel.domain import get_raw_model
from credit.parallel.ema import EMA
from credit.parallel.look import StepBuffers
from credit.parallel.parallelize import Gradients
from credit.parallel.validated import best_step, read_losses
from credit.status import Status, refuse_removed, write_status
from credit.stop import StopRequest
from credit.training.batches import AgreedBatches
from credit.training.facts import refuse_other_run, run_facts, stages_after
from credit.training.log import StepLog, refuse_missing_tensorboard
from credit.training.loss import LatitudeWeightedLoss
from credit.training.noise import Noise
from credit.training.profile import Profile
from credit.training.rollout import changes
from credit.training.schedule import Schedule
from credit.training.setup import open_store, prepare_training

MAX_SKIPPED = 10
"""Steps in a row whose gradients are not finite: more are no accident."""

FIELDS = ("x", "y", "forcings")
"""Entries of a batch that are computed with."""


@dataclass(eq=False)
class Trained:
    """What a call to `train` leaves: the model, and of each step that it ran the global mean loss and gradient norm."""

    model: nn.Module
    losses: list[float]
    gradient_norms: list[float]
    valid_loss: float | None = None


class TrainingRun:
    """One rank's part of a training run."""

    def __init__(self, job: Job, request: StopRequest | None = None) -> None:
        self.job, self.trainer = job, job.config.trainer
        self.dtype = getattr(torch, self.trainer.dtype)
        with together("opening the log"):
            refuse_missing_tensorboard(self.trainer.tensorboard and job.is_first)
        store, statistics = open_store(job, request)
        rows = job.rows(store.grid.shape[0])
        with together("opening the data"):
            self.fields = Fields(job.config, store, statistics, rows)
            datasets = {period: StepDataset(self.fields, period) for period in ("train", "valid")}
        self.samplers: dict[str, DataParallelSampler] = {}
        self.loaders: dict[str, Any] = {}
        with together("laying out the batches"):
            self._lay_out_batches(datasets)
        self.model, self.look = prepare_training(job, self.fields)
        self.gradients = Gradients(self.model, job.mesh, self.trainer)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=self.trainer.learning_rate, weight_decay=self.trainer.weight_decay
        )
        with together("building the loss"):
            self.loss = LatitudeWeightedLoss(
                self.trainer.loss, store.grid, rows, self.fields.predicted, self.fields.mask, job.config.data.boundary
            ).to(job.device)
        self.noise = Noise(self.trainer.seed, store.grid.shape, rows, job.device, self.dtype)
        self.unit = self.fields.unit.to(job.device, self.dtype)
        self.edge = None if self.fields.edge is None else self.fields.edge.to(job.device)
        self.ema = EMA(self.model, self.trainer.ema) if self.trainer.ema is not None else None
        self.steps_per_epoch = self.samplers["train"].batches
        self.steps = self.trainer.epochs * self.steps_per_epoch
        with together("reading trainer.schedule"):
            self.schedule = Schedule(self.trainer, [self.trainer.epochs], self.steps_per_epoch)
        self.log: StepLog
        self.saved = 0  # the newest checkpoint's step
        self.validated: dict[int, float] = {}  # losses, by step
        self.skipped = 0  # steps in a row
        self.checkpoints = Checkpointer(
            job.config.run / "checkpoints",
            self.model,
            self.optimizer,
            self.ema,
            run_facts(job.config, statistics, store.grid),
            in_background=self.trainer.checkpoint_async,
            keep=self.trainer.keep,
        )

    def _lay_out_batches(self, datasets: dict[str, StepDataset]) -> None:
        job, trainer, data = self.job, self.trainer, self.job.config.data
        for period, dataset in datasets.items():
            seed = trainer.seed if period == "train" else None
            sampler = DataParallelSampler(len(dataset), trainer.batch_size, job.coords.dp, job.shape.dp, seed)
            pin = job.device.type == "cuda"
            self.samplers[period] = sampler
            self.loaders[period] = BatchLoader(dataset, sampler, data.workers, data.prefetch, pin=pin)
        self._check_accumulation(self.samplers["train"].share)

    def _check_accumulation(self, samples: int) -> None:
        if samples % self.trainer.accumulate:
            raise ConfigError(
                f"trainer.batch_size {self.trainer.batch_size} gives {samples} samples to each of {self.job.shape.dp} "
                f"replicas, which do not divide into trainer.accumulate: {self.trainer.accumulate} parts"
            )

    def predict(self, x: Tensor) -> Tensor:
        """The model, under autocast for `trainer.precision: bf16` (FSDP2 brings its own)."""
        autocast = self.trainer.precision == "bf16" and self.trainer.parallelism.data != "fsdp2"
        with torch.autocast(self.job.device.type, torch.bfloat16, enabled=autocast):
            return self.model(x)

    def shares_of_loss(self, batch: dict[str, Tensor], draw: int) -> Iterator[Tensor]:
        """This rank's share of the sum of the samples' losses: of each step of the rollout its part in the mean.

        Args:
            draw: a number; another one gives the members of an ensemble other noise.
        """
        members = self.trainer.loss.ensemble
        batch = {name: value.to(self.job.device, non_blocking=True) for name, value in batch.items()}
        fields = {name: value.to(self.dtype) for name, value in batch.items() if name in FIELDS}
        targets, noise = fields["y"].unbind(1), None
        if members > 1:
            fields = {name: value.repeat_interleave(members, dim=0) for name, value in fields.items()}
            noise = partial(self.noise, [(draw, *one) for one in self._members_of(batch)])
        states = self.fields.state_channels, self.job.config.data.history
        steps = changes(self.predict, fields, states, self.unit, self.trainer.rollout_detach, noise, self.edge)
        for change, target in zip(steps, targets, strict=True):
            yield self.loss(change, target, batch["weight"]) / self.trainer.rollout

    def train_step(self, batch: dict[str, Tensor], step: int) -> tuple[float, float, float]:
        """One optimiser step; (global mean loss, gradient norm, learning rate)."""
        total = all_sum(self._backward(batch, step))
        self.gradients.reduce()
        # Averages, of parts that add up. Not the loss is scaled: hooks and functions that clip gradients would see it.
        flat = self.job.gradient_mesh
        scale_gradients(self.model.parameters(), flat.size() if flat is not None else 1)
        clipped = clip_grad_norm_(self.model.parameters(), self.trainer.clip)
        # The one place where the host waits for the device: weights are not touched unless the norm is finite.
        loss, norm = torch.stack([total, clipped.to(total.dtype)]).tolist()
        rate = self.schedule.rate(step)
        if not self._is_usable(norm, step):
            self.optimizer.zero_grad()
            return loss, norm, rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(step + 1)
        return loss, norm, rate

    def _is_usable(self, norm: float, step: int) -> bool:
        """False if the step is to be skipped. The norm is every rank's.

        Raises:
            CreditError: if it is not finite, before the weights are touched.
        """
        if math.isfinite(norm):
            self.skipped = 0
            return True
        self.skipped += 1
        if self.trainer.nonfinite == "skip" and self.skipped <= MAX_SKIPPED:
            self.job.say(f"step {step + 1} is skipped: the norm of its gradient is {norm}")
            return False
        raise CreditError(
            f"the norm of the gradient is {norm} at step {step + 1}{self._not_finite()}, and did not "
            f"change the weights; {self.checkpoints.directory} holds the steps before. Lower trainer.learning_rate, "
            f"look for a square root or a division that meets zero, or set trainer.nonfinite: skip"
        )

    def _not_finite(self) -> str:
        """The parameters whose gradients are not finite on some rank, the first of them."""
        named = get_raw_model(self.model).named_parameters()
        mine = [name for name, p in named if p.grad is not None and not bool(local(p.grad).isfinite().all())]
        found = [*dict.fromkeys(name for names in gather_objects(mine) for name in names)]
        return f", of {', '.join(found[:3])}{' and others' if len(found) > 3 else ''}" if found else ""

    def _backward(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Gradients on this rank, one part of the batch after another; its share of the mean loss, float64.

        Tensor-parallel peers have the same loss, and share it.

        Steps of a rollout that are detached have a backward each, so that one is kept in memory at a time.
        """
        share = torch.zeros((), dtype=torch.float64, device=self.job.device)
        at_once = 1 if self.trainer.rollout_detach else self.trainer.rollout
        parts, stages = self.trainer.accumulate, self.trainer.rollout // at_once
        buffers = StepBuffers(get_raw_model(self.model), self.look, parts, self.job.replicas)
        for part in range(parts):
            size = len(batch["weight"]) // parts
            piece = {name: value[part * size : (part + 1) * size] for name, value in batch.items()}
            # Each part begins as the whole batch does: with the step's random numbers, and the buffers as they were.
            seed_torch(hash((self.trainer.seed, step)) % 2**63)
            buffers.begin_part()
            losses = self.shares_of_loss(piece, draw=1 + step)
            with self.look.sampled(self._members_of(piece)):
                for stage in range(stages):
                    with self.gradients.adding_up(last=(part, stage) == (parts - 1, stages - 1)):
                        loss = torch.stack(list(islice(losses, at_once))).sum() / self.trainer.batch_size
                        loss.backward()
                    share += loss.detach()
            buffers.end_part()
        buffers.end_step()
        return share / self.job.shape.tp

    def _members_of(self, batch: dict[str, Tensor]) -> list[tuple[int, int]]:
        """(sample, member) of each state that the model is given of a batch."""
        members = range(self.trainer.loss.ensemble)
        return [(sample, member) for sample in batch["sample"].tolist() for member in members]

    @torch.no_grad()
    def validate(self, request: StopRequest | None = None) -> float | None:
        """Global mean loss over the validation period, of the averaged weights if there are any; None if stopped."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.job.device)
        with self.ema.in_place_of_weights() if self.ema is not None else nullcontext():
            batches = AgreedBatches(self.loaders["valid"], request)
            for batch in batches:
                if batch is None:
                    self.model.train()
                    return None
                share = torch.stack(list(self.shares_of_loss(batch, draw=0))).sum().double()
                total += all_sum(share / self.job.shape.tp)
                batches.agree()
        self.model.train()
        return float(total) / self.samplers["valid"].samples

    def resume(self) -> int:
        """Load the newest good checkpoint, if there is one; the step to go on with."""
        newest = newest_good_checkpoint(self.checkpoints.directory, self.job.say)
        if newest is None:
            return 0
        path, facts = newest
        step = int(path.name.removeprefix("step-"))
        stages = stages_after(facts, step // self.steps_per_epoch, self.trainer.epochs)
        self.checkpoints.facts["trainer"]["stages"] = stages
        refuse_other_run(facts, self.checkpoints.facts, but=("trainer.stages",))
        self.schedule = Schedule(self.trainer, stages, self.steps_per_epoch)
        self.checkpoints.load(path)
        self.job.say(f"resuming from {path}" if step < self.steps else f"{path} is the last: nothing to do")
        return step

    def run(self, request: StopRequest, profile: int = 0) -> Trained:
        """All steps that are left, with checkpoints, validation after each epoch, and a log; some profiled.

        Raises:
            Stopped: on all ranks, after saving, once any has a stop request.
            LaunchError: if the job's time is up before its first step.
        """
        first = self.saved = self.resume()
        trained = Trained(self.model, [], [])
        self.job.config.run.mkdir(parents=True, exist_ok=True)
        self._tell("running", first)
        with together("looking at the clock"):
            request.refuse_too_late()
        self._enforce_contract(first)
        is_first, directory = self.job.is_first, self.job.config.run
        with together("opening the log"):
            log = self.log = StepLog(directory, first, self.steps, is_first, self.trainer.tensorboard)
        with together("reading the validation losses"):
            losses = read_losses(self.checkpoints.directory)
        # Rank 0's: over a network, another may see an older file.
        self.validated = {step: loss for step, loss in gather_objects(losses)[0].items() if step <= first}
        self.model.train()
        epochs, begun = divmod(first, self.steps_per_epoch)
        if epochs and not begun:
            self._validate_once(epochs, trained, log, request)  # in which a job may have stopped
        with Profile(directory, first, profile, is_first) as recorded:
            while epochs < self.trainer.epochs and not self._is_stale():
                for _ in self._epoch(epochs, begun, trained, log, request):
                    recorded.step()
                epochs, begun = epochs + 1, 0
                self._validate_once(epochs, trained, log, request)
        self.checkpoints.close()
        log.close()
        self._tell("finished", epochs * self.steps_per_epoch)
        return trained

    def _validate_once(self, epochs: int, trained: Trained, log: StepLog, request: StopRequest) -> None:
        """After so many epochs, unless that is in the log.

        Raises:
            Stopped: on all ranks, after saving, once any has a stop request.
        """
        step = epochs * self.steps_per_epoch
        if step in self.validated:
            return
        trained.valid_loss = self.validate(request)
        if trained.valid_loss is None:
            self._stop(step, request)
        self.validated[step] = trained.valid_loss
        self.checkpoints.validated(self.validated)
        log.epoch(epochs, step, trained.valid_loss)
        with together("writing the log"):
            log.check()

    def _is_stale(self) -> bool:
        """True once the validation loss has not been less than before for `trainer.patience` epochs."""
        best = best_step(self.validated)
        if self.trainer.patience is None or best is None:
            return False
        since = sum(step > best for step in self.validated)
        if since >= self.trainer.patience:
            self.job.say(f"no validation loss below that of step {best} for {since} epochs: training ends")
        return since >= self.trainer.patience

    def _enforce_contract(self, first: int) -> None:
        """Before the first step. Each rank reads its own rows, so what is compared is which samples they are."""
        epoch, done = divmod(first, self.steps_per_epoch)
        self.samplers["train"].start_at(epoch, done)
        drawn = {"train": done * self.trainer.batch_size, "valid": 0}
        for period, loader in self.loaders.items():
            self.loaders[period] = enforce_sampler_contract(
                loader, self.trainer, drawn=drawn[period], whole=("sample", "time", "weight")
            )

    def _epoch(self, epoch: int, done: int, trained: Trained, log: StepLog, request: StopRequest) -> Iterator[None]:
        """Take the steps of an epoch, from number `done` on; yields after each."""
        self.samplers["train"].start_at(epoch, done)
        step = epoch * self.steps_per_epoch + done
        batches = AgreedBatches(self.loaders["train"], request)
        for batch in batches:
            if batch is None:
                self._stop(step, request)
            begin = time.perf_counter()
            loss, norm, rate = self.train_step(batch, step)
            batches.agree()
            seconds = time.perf_counter() - begin - batches.waited
            step += 1
            trained.losses.append(loss)
            trained.gradient_norms.append(norm)
            log.step(step, epoch + 1, loss, norm, rate, self.trainer.batch_size, seconds, batches.waited)
            if not math.isfinite(loss) and not self.skipped:
                raise CreditError(
                    f"the loss is {loss} at step {step}: lower trainer.learning_rate, or set trainer.clip; "
                    f"{self.checkpoints.directory} holds the steps before"
                )
            if step % self.trainer.checkpoint_every == 0 or step % self.steps_per_epoch == 0:
                self._save(step)
            yield

    def _stop(self, step: int, request: StopRequest) -> NoReturn:
        if self.saved < step:
            self._save(step)
        self.checkpoints.close()
        self._tell("stopped", step)
        signal = f" by {request.received}" if request else ""
        raise Stopped(f"at step {step} of {self.steps}{signal}, and saved: the same command goes on from there")

    def _save(self, step: int) -> None:
        with together("looking at the run directory"):
            self.log.check()
            if self.job.is_first:
                refuse_removed(self.job.config.run)
        self.checkpoints.save(step)
        self.saved = step

    def _tell(self, state: Literal["running", "stopped", "finished"], step: int) -> None:
        """For `credit status`, and for scripts that go on with what is not finished."""
        with together("writing the status"):
            if self.job.is_first:
                write_status(self.job.config.run, Status(state, step, self.steps, (*self.job.shape,)))


def train(job: Job, request: StopRequest | None = None, profile: int = 0) -> Trained:
    """Train the config's model on this job's mesh, from its newest checkpoint on, until done or asked to stop.

    Args:
        profile: steps of which rank 0 writes a chrome trace to the run directory.
    """
    request = StopRequest() if request is None else request
    request.clock_ahead = job.clock_ahead
    with sole_writer(job):
        return _train(job, request, profile)


def _train(job: Job, request: StopRequest, profile: int) -> Trained:
    run = TrainingRun(job, request)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    shape = job.shape
    job.say(
        f"{job.config.model.name}: {parameters:,} parameters, {run.samplers['train'].samples} samples, "
        f"{run.steps} steps of {job.config.trainer.batch_size}; mesh dp {shape.dp} x tp {shape.tp} x domain "
        f"{shape.domain} ({job.config.trainer.parallelism.data}) on {job.device.type}, ranks from {job.ranks.source}"
    )
    job.say(f"computing in {in_words(job.config.trainer)}")
    return run.run(request, profile)
