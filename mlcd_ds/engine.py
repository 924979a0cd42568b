"""DeepSpeed's engine around the encoder, the class heads beside it, as one step. The only file that imports deepspeed.
contrastive_engine.py has the same around two towers that are trained on captions.

Why a head is not in the engine: the engine would broadcast rank 0's centers over everybody's shards and average their
gradients. The head's loss is the mean over the global batch on every rank; `engine.backward(loss)` divides it by the
number of accumulated micro-batches, which reaches encoder and head alike. With several heads the loss is the weighted
sum of theirs.
"""

import argparse
import contextlib
import io
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from safetensors.torch import load_file

from mlcd_ds import checkpoint, collectives, universal
from mlcd_ds.averaging import Pieces
from mlcd_ds.batch import ImageLabelBatch, head_suffix
from mlcd_ds.checkpoint import Checkpoint
from mlcd_ds.config import EncoderOptions, HeadConfig
from mlcd_ds.ds_config import DeepSpeedSettings
from mlcd_ds.errors import CheckpointError, UserError
from mlcd_ds.feed import ImageFeed, Sent
from mlcd_ds.files import plain_write_errors, save_tensors
from mlcd_ds.models.compiled import Recompilations, check_compiler, compile_blocks
from mlcd_ds.models.recompute import Recompute, resolve_recompute, run_selectively
from mlcd_ds.models.vit import Block, VisionTransformer, Visit, decay_groups
from mlcd_ds.monitor import never_stopping
from mlcd_ds.optim import GradientSum, RowAdamW, sharded_norms
from mlcd_ds.partial_fc import PartialFC
from mlcd_ds.profiling import BACKWARD, FORWARD, HEAD, OPTIMIZER, OTHER, PhaseClock
from mlcd_ds.sampling import Draw, Marked, positions
from mlcd_ds.sharded_loss import RowGradient
from mlcd_ds.topology import Topology, set_timeout_of_every_group
from mlcd_ds.universal import ENGINE_TAG, UNIVERSAL, refuse_foreign_pickles


def _quieten() -> None:
    """Leaves DeepSpeed's warnings on, but for a few that every start or load prints and nobody can act on."""
    deepspeed.utils.logger.setLevel("WARNING")
    # Its schedulers ask themselves for the learning rate before their first step; a skipped step is told by the trainer.
    unheard = ("before it has started", "OVERFLOW! Skipping step", "MPU is not provided")
    deepspeed.utils.logger.addFilter(lambda record: not any(words in record.getMessage() for words in unheard))
    # It calls torch's collectives by the names that torch 2.13 calls deprecated.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step was.

    loss, grad_norm, head_grad_norms (one per head): the norms before clipping, over all ranks; grad_norm is nan or
    inf where the step was skipped. applied: False where loss, encoder's or a head's gradient was no number on any
    rank: nothing has moved, on no rank. bad, bad_ranks: of a skipped step, what was no number first ("embeddings",
    "centers", "gradients") and where. stop_ranks: how many ranks have asked to stop. stats: the heads', averaged over
    the micro-batches by their images, empty unless asked for; those of the heads after the first end in "_1", "_2"
    ... learning_rate, head_learning_rate: of this step. recompilations: graphs that torch.compile has made since the first
    step of this process, None where nothing is compiled.
    """

    loss: float
    grad_norm: float
    head_grad_norms: tuple[float, ...]
    learning_rate: float
    head_learning_rate: float
    applied: bool
    stats: dict[str, torch.Tensor]
    bad: str = ""
    bad_ranks: tuple[int, ...] = ()
    stop_ranks: int = 0
    recompilations: int | None = None


@dataclass(frozen=True)
class Computed:
    """What a step has computed before it is known whether it may be taken.

    loss, head_norm_values, stop_ranks: on the host, the same on every rank. head_norms: the same on the device. gradients:
    of this rank's rows, per head. broken: of each micro-batch, whether its embeddings were no numbers. stats: StepResult's.
    """

    loss: float
    stop_ranks: int
    broken: list[torch.Tensor]
    stats: dict[str, torch.Tensor]
    gradients: Sequence[RowGradient] = ()
    head_norms: torch.Tensor | Sequence[torch.Tensor] = ()
    head_norm_values: Sequence[float] = ()


@dataclass(frozen=True)
class _Marks:
    """The classes of a step's A micro-batches and H heads, before the host knows how many there are.

    of_heads: [A][H]. unions: [H], bool [c] each, which rows any micro-batch has; None where that is each of them. sizes:
    int64, all that the host must learn: of each mark its two, of each union its one.
    """

    batch: ImageLabelBatch
    step: int
    of_heads: list[list[Marked]]
    unions: list[torch.Tensor | None]
    sizes: torch.Tensor


class TrainEngine:
    """Encoder and heads, trained together: one `train_step` moves all or none.

    model: the encoder, taken over by DeepSpeed. heads: this rank's shard of each. settings: the resolved JSON. config: the
    heads' weights and optimizer settings. topology must have been started. options: what of the encoder is recomputed and
    whether it is compiled; what it leaves out at random is its own (`Dropping`), told by the slots of the images.
    `_parameter_groups`, `_compute`, `_save_model` and `_compare_model` are what another kind of training does otherwise.
    """

    def __init__(
        self,
        model: VisionTransformer,
        heads: Sequence[PartialFC],
        settings: DeepSpeedSettings,
        config: HeadConfig,
        topology: Topology,
        timeout_minutes: float,
        options: EncoderOptions | None = None,
    ):
        _quieten()
        # Else the first run on a CPU compiles a shared-memory extension, for which it needs g++ and up to a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.heads, self.settings, self.config, self.topology = heads, settings, config, topology
        self.head_weights = config.head_weights or (1.0,) * len(heads)
        # Nothing moves these. They are kept as they came: the engine may hold them rounded or in parts.
        self._frozen: dict[str, torch.Tensor] = {}
        if topology.is_main:
            frozen = ((name, weight) for name, weight in model.named_parameters() if not weight.requires_grad)
            self._frozen = {name: weight.detach().cpu().clone() for name, weight in frozen}
        self.clock = PhaseClock(topology.device)
        options = options or EncoderOptions()
        section = settings.json.get("activation_checkpointing")
        recompute = resolve_recompute(options.checkpoint_layers, section, model.depth)
        if options.compile:
            check_compiler(topology.device.type)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=self._parameter_groups(model),
            config=_with_whole_blocks(model, settings) if options.compile or recompute.selective else settings.json,
            dist_init_required=False,
        )
        self._copies = _float32_copies(self.engine.optimizer) if settings.zero_stage == 0 else {}
        self._set_recompute(model, recompute)
        if options.compile:
            compile_blocks(module for module in model.modules() if isinstance(module, Block))
        self._recompilations = Recompilations() if options.compile else None
        set_timeout_of_every_group(timeout_minutes)
        decay = settings.weight_decay if config.head_weight_decay is None else config.head_weight_decay
        moments = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.head_moments]
        self.head_optimizers = [
            RowAdamW(
                head.centers.data,
                settings.betas,
                settings.eps,
                decay,
                moments=moments,
                seed=head.sampler.seed,
                kernels=config.head_kernels,
                first_row=head.start,
            )
            for head in heads
        ]
        self.skipped_steps = 0
        self._ahead: tuple[_Marks, list[int]] | None = None
        self._feed = ImageFeed(topology.device)
        self._sent: tuple[ImageLabelBatch, Sent] | None = None
        # What is no number anywhere in the backward pass reaches the first layer: this rank's own gradient there, before
        # the engine mixes it with the others', tells whose fault a bad step is.
        self._own_gradient_is_bad: list[torch.Tensor] = []
        self._write_error: Exception | None = None
        self._written: list[Path] = []
        self._make_writes_patient()
        for weight in model.first_weights():
            weight.register_hook(self._note_own_gradient)

    def _parameter_groups(self, model: torch.nn.Module) -> list[dict]:
        """What the optimizer takes of the model; the learning rate of the first group is the one that is reported."""
        return decay_groups(model, self.settings.weight_decay)

    @property
    def monitor_events(self):
        """DeepSpeed's monitors, by the JSON: a function that takes [(tag, value, samples)]."""
        return self.engine.monitor.write_events

    @property
    def tensorboard(self):
        """The SummaryWriter of the JSON's tensorboard block on rank 0, else None."""
        return getattr(self.engine.monitor.tb_monitor, "summary_writer", None)

    def train_step(
        self,
        batch: ImageLabelBatch,
        step: int,
        collect_stats: bool = False,
        next_batch: ImageLabelBatch | None = None,
        stop_wanted: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """One optimizer step on this rank's images of the step, in micro-batches.

        A step whose loss or gradient is no number on any rank is skipped on all: encoder, heads and learning rate stay.
        next_batch: that of the step after this one, on every rank or on none. Its first images are sent to the device, its
        classes are sampled behind this step's backward, and how many there are comes to the host with this step's loss;
        without it the next step begins by waiting for that. stop_wanted: asked late in the step; the answers of all ranks
        are summed by the all-reduce that sums the heads' norms, and come to the host with the loss.
        """
        self._own_gradient_is_bad.clear()
        computed = self._compute(batch, step, collect_stats, next_batch, stop_wanted)
        self.clock.begin(OPTIMIZER)
        plain_norm = self._norm_without_zero()
        finite = all(math.isfinite(value) for value in (computed.loss, *computed.head_norm_values, plain_norm or 0.0))
        learning_rate = self.engine.get_lr()[0]
        with contextlib.nullcontext() if finite else self._overflowing():
            self.engine.step()
        applied = bool(self.engine.was_step_applied())
        norm = self.engine.get_global_grad_norm() if plain_norm is None else plain_norm
        norm = math.nan if norm is None else float(norm)  # before the heads' steps are queued: the host may wait for it
        bad, bad_ranks = "", ()
        gradients = computed.gradients
        if applied:
            for optimizer, gradient, head_norm in zip(
                self.head_optimizers, gradients, computed.head_norms, strict=True
            ):
                self._step_head(optimizer, gradient, head_norm, learning_rate * self.config.head_lr_scale, step)
        else:
            self.skipped_steps += 1
            bad, bad_ranks = self._whose_fault(computed.broken, [gradient.values_SD for gradient in gradients])
        for head, gradient in zip(self.heads, gradients, strict=True):
            head.recycle(gradient)
        self.clock.begin(OTHER)
        return StepResult(
            loss=computed.loss,
            grad_norm=norm,
            head_grad_norms=tuple(computed.head_norm_values),
            learning_rate=learning_rate,
            head_learning_rate=learning_rate * self.config.head_lr_scale,
            applied=applied,
            stats=computed.stats,
            bad=bad,
            bad_ranks=bad_ranks,
            stop_ranks=computed.stop_ranks,
            recompilations=self._count_recompilations(step),
        )

    def _compute(
        self,
        batch: ImageLabelBatch,
        step: int,
        collect_stats: bool,
        next_batch: ImageLabelBatch | None,
        stop_wanted: Callable[[], bool],
    ) -> Computed:
        """Forward and backward passes of all micro-batches, up to the step itself. Arguments as for `train_step`."""
        self.clock.begin(HEAD)
        micro_batches = batch.split(self.settings.micro_batch)
        marks, sizes = self._ahead or (None, [])
        if marks is None or marks.batch is not batch or marks.step != step:
            marks = self._mark(batch, step)
            sizes = marks.sizes.tolist()
        self._ahead = None
        draws, sums = self._draw(marks, sizes)
        weights = self._weights(draws)
        del marks
        for head in self.heads:
            head.take_gradients()  # of a step that was interrupted between its head and its encoder
        losses, stats, broken = [], [], []
        sent = self._send(batch, micro_batches)
        for index in range(len(micro_batches)):
            images_BCHH = sent.take()
            if index < len(micro_batches) - 1:
                sent = self._feed.send(micro_batches[index + 1].images_BCHH)
            self.clock.begin(FORWARD)
            embeddings = self.engine(images_BCHH, *self._visit(step, index))
            self.clock.begin(HEAD)
            gathering = self.heads[0].gather(embeddings, self.settings.micro_batch)
            outs = [
                head(gathering, draw, collect_stats=collect_stats)
                for head, draw in zip(self.heads, draws[index], strict=True)
            ]
            loss = self._weighted([out.loss for out in outs]) * weights[index]
            self.clock.begin(BACKWARD)
            self.engine.backward(loss)
            self.clock.begin(HEAD)
            for head, total in zip(self.heads, sums, strict=True):
                (gradient,) = head.take_gradients()
                if not total.add(index, gradient):
                    head.recycle(gradient)
            losses.append(loss.detach())
            broken.append(~torch.isfinite(embeddings.detach()).all())
            stats.append({f"{name}{head_suffix(h)}": x for h, out in enumerate(outs) for name, x in out.stats.items()})
            if index < len(micro_batches) - 1:
                self.engine.step()
        gradients = [total.gradient for total in sums]
        own = [gradient.values_SD for gradient in gradients]
        # A fill of a device's number: a copy from the host would have to be waited for.
        stop = torch.full((1,), float(stop_wanted()), device=own[0].device)
        head_norms, stop_ranks = sharded_norms(own, self.topology, riders=stop)
        ahead = None
        if next_batch is not None:
            ahead = self._mark(next_batch, step + 1)
            self._sent = next_batch, self._send(next_batch, next_batch.split(self.settings.micro_batch))
        # Whether the step may be taken must be known before it is taken: here the host waits for the device, once for
        # all heads, their norms and the next step's classes (DeepSpeed's own step waits for its norm besides).
        told = [torch.stack(losses).mean().double()[None], stop_ranks.double(), head_norms.double()]
        loss, stopping, *rest = torch.cat(told if ahead is None else [*told, ahead.sizes.double()]).tolist()
        head_norm_values = rest[: len(head_norms)]
        if ahead is not None:
            self._ahead = ahead, [int(size) for size in rest[len(head_norms) :]]
        return Computed(
            loss=loss,
            stop_ranks=round(stopping),
            broken=broken,
            stats=_averaged(stats, weights) if collect_stats else {},
            gradients=gradients,
            head_norms=head_norms,
            head_norm_values=head_norm_values,
        )

    def _send(self, batch: ImageLabelBatch, micro_batches: list[ImageLabelBatch]) -> Sent:
        """The batch's first images, perhaps under way since the step before."""
        before, self._sent = self._sent, None
        if before is not None and before[0] is batch:
            return before[1]
        return self._feed.send(micro_batches[0].images_BCHH)

    def _visit(self, step: int, index: int) -> tuple[Visit, ...]:
        """The images of the `index`-th micro-batch of a step, for a model that leaves something out; () for another."""
        if self.engine.module.dropping is None:
            return ()
        first_slot = self.topology.rank * self.settings.images_per_rank + index * self.settings.micro_batch
        return (Visit(step, first_slot),)

    def _set_recompute(self, model: VisionTransformer, recompute: Recompute) -> None:
        if not recompute.blocks:
            return
        if recompute.selective:
            model.set_checkpointing(run_selectively)
            return
        # After initialize: the section is read with the engine's world size.
        deepspeed.checkpointing.configure(None, deepspeed_config=self.settings.json)
        model.set_checkpointing(deepspeed.checkpointing.checkpoint, recompute.blocks)

    def _count_recompilations(self, step: int) -> int | None:
        if self._recompilations is None:
            return None
        new = self._recompilations.after_step()
        if new:
            print(
                f"WARNING: rank {self.topology.rank}: {new} graphs were compiled anew in step {step + 1}, "
                f"{self._recompilations.count} since the first: shapes, dtypes or gradient modes change from step to step. "
                "TORCH_LOGS=recompiles says which; without --compile nothing waits for a compiler.",
                flush=True,
            )
        return self._recompilations.count

    def _whose_fault(self, broken: list[torch.Tensor], own: list[torch.Tensor]) -> tuple[str, tuple[int, ...]]:
        """Of a bad step: what was no number first, and on which ranks. One small gather, on every rank.

        In that order, because embeddings or centers of one rank spoil the loss, and with it everybody's gradients.
        broken: of each micro-batch, whether the embeddings were. own: the gradients of this rank's rows, per head.
        """
        gradients = [*self._own_gradient_is_bad, *(~torch.isfinite(values).all() for values in own)]
        signs = {
            "embeddings": broken,
            "centers": [~torch.isfinite(head.centers.detach()).all() for head in self.heads],
            "gradients": gradients,
        }
        found = {what: any(sign.item() for sign in several) for what, several in signs.items()}
        of_ranks = collectives.gather_objects(found, self.topology)
        for what in signs:
            if ranks := tuple(rank for rank, found in enumerate(of_ranks) if found[what]):
                return what, ranks
        return "gradients", ()

    def _note_own_gradient(self, gradient: torch.Tensor) -> None:
        self._own_gradient_is_bad.append(~torch.isfinite(gradient).all())

    @contextlib.contextmanager
    def _overflowing(self) -> Iterator[None]:
        """Within it `engine.step()` discards the gradients as it does after an overflow, whatever they are.

        So the engine's own counts stay right: global_steps and samples advance, skipped_steps too, the learning rate's
        schedule waits. Each of DeepSpeed's optimizers comes to its verdict in a place of its own.
        """
        optimizer = self.engine.optimizer

        def discard(*_, **__) -> None:
            optimizer.overflow = True
            optimizer._global_grad_norm = math.inf
            if hasattr(optimizer, "clear_hp_grads"):  # BF16_Optimizer: ZeRO 1 in bfloat16
                optimizer.clear_hp_grads()
                optimizer.clear_lp_grads()
            else:
                optimizer.zero_grad(set_to_none=True)

        def overflow(*_, **__) -> bool:
            optimizer.overflow = True
            return True

        if self.settings.zero_stage == 3:
            verdict = {"_overflow_check_and_loss_scale_update": overflow}
        elif hasattr(optimizer, "check_grad_overflow"):  # ZeRO 1 and 2
            verdict = {"check_grad_overflow": True, "check_overflow": overflow}
        else:
            verdict = {"step": discard}
        before = {name: vars(optimizer)[name] for name in verdict if name in vars(optimizer)}
        is_plain = isinstance(optimizer, torch.optim.Optimizer)  # float32 without ZeRO: knows no overflow
        try:
            vars(optimizer).update(verdict)
            yield
        finally:
            for name in verdict:
                del vars(optimizer)[name]
            vars(optimizer).update(before)
            if is_plain:
                del optimizer.overflow, optimizer._global_grad_norm

    def _weighted(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """The heads' losses, weighted and summed."""
        return sum(loss * weight for loss, weight in zip(losses, self.head_weights, strict=True))

    def _weights(self, draws: list[list[Draw]]) -> torch.Tensor:
        """[A] float32: by how much each of the A micro-batches counts, 1 on average.

        The head's loss is the mean over the images of one micro-batch of all ranks, and the engine takes the plain mean of
        the A losses. Slots without an image make the micro-batches uneven: weighted by their images, the step's loss is
        the mean over all images of the step.
        """
        counts_A = torch.stack([own[0].counts_G.sum() for own in draws]).float()
        return counts_A * len(counts_A) / counts_A.sum().clamp_min(1)

    def _norm_without_zero(self) -> float | None:
        """At stage 0 in float32 DeepSpeed neither reports the norm nor skips a step of NaNs; else None: it does both."""
        if self.settings.zero_stage > 0 or self.settings.precision != "float32":
            return None
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()

    def _mark(self, batch: ImageLabelBatch, step: int) -> _Marks:
        """Samples the classes of a step; on a GPU the host waits for nothing."""
        # All labels of the step in one copy, from pinned memory where the loader pins.
        labels_BL = batch.labels_BL.to(self.topology.device, non_blocking=True)
        on_device = ImageLabelBatch(batch.images_BCHH, labels_BL, batch.keys)
        of_heads = [
            [
                head.mark(labels_bL, step=step * self.settings.accumulation + i, capacity=self.settings.micro_batch)
                for head, labels_bL in zip(self.heads, micro.labels_of_heads(len(self.heads)), strict=True)
            ]
            for i, micro in enumerate(on_device.split(self.settings.micro_batch))
        ]
        unions: list[torch.Tensor | None] = []
        for own in zip(*of_heads, strict=True):
            masks = [marked.marked_c for marked in own]
            same = len(masks) == 1 or masks[0] is None
            unions.append(None if same else torch.stack(masks).any(dim=0))
        sizes = [marked.sizes_2 for own in of_heads for marked in own]
        sizes += [union_c.sum()[None] for union_c in unions if union_c is not None]
        return _Marks(batch, step, of_heads, unions, torch.cat(sizes))

    def _draw(self, marks: _Marks, sizes: list[int]) -> tuple[list[list[Draw]], list[GradientSum]]:
        """The draws [A][H], and of each head where its gradients are summed. sizes: marks.sizes, known to the host."""
        known = iter(sizes)
        draws = [
            [head.draw(marked, (next(known), next(known))) for head, marked in zip(self.heads, own, strict=True)]
            for own in marks.of_heads
        ]
        sums = []
        for own, union_c in zip(zip(*draws, strict=True), marks.unions, strict=True):
            union_S = None if union_c is None else positions(union_c, next(known))
            sums.append(GradientSum([draw.rows_S for draw in own], union_S))
        return draws, sums

    def _step_head(
        self, optimizer: RowAdamW, gradient: RowGradient, norm: torch.Tensor, learning_rate: float, step: int
    ) -> None:
        """Steps one head's centers. norm: of their gradient, over all shards."""
        if self.config.head_grad_clip > 0:
            factor = (self.config.head_grad_clip / (norm + 1e-6)).clamp(max=1)
            gradient.values_SD.mul_(factor)
        optimizer.step(gradient, learning_rate, step)

    def _make_writes_patient(self) -> None:
        """Lets DeepSpeed's save_checkpoint come to its end on every rank, with all its barriers, when a disk is full.

        The first error of this rank's writes is kept for `save` to raise. Nor do its monitors stop a step.
        """

        def patient(function: Callable) -> Callable:
            def call(*arguments, **options):
                try:
                    with plain_write_errors(arguments[1] if len(arguments) > 1 else "a file of DeepSpeed's"):
                        return function(*arguments, **options)
                except OSError as error:
                    self._write_error = self._write_error or error

            return call

        writer, monitor = self.engine.checkpoint_engine, self.engine.monitor
        save = writer.save

        def noted(*arguments, **options):
            result = save(*arguments, **options)
            self._written.append(Path(arguments[1] if len(arguments) > 1 else options["path"]))
            return result

        writer.save, writer.makedirs = patient(noted), patient(writer.makedirs)
        self.engine._copy_recovery_script = patient(self.engine._copy_recovery_script)
        monitor.write_events = never_stopping(monitor.write_events, "a log of DeepSpeed's monitors")

    def encoder_weights(self) -> dict[str, torch.Tensor]:
        """The float32 weights on the CPU, whole, whatever the ZeRO stage; those that nothing trains on rank 0 alone.

        Every rank must call it.
        """
        partitioned = self.settings.zero_stage == 3 or self.settings.precision != "float32"
        weights = {}
        for name, parameter in self.engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            full = deepspeed.utils.safe_get_full_fp32_param(parameter) if partitioned else None
            weights[name] = (self._whole(parameter) if full is None else full).detach().float().cpu()
        return weights | self._frozen

    def _whole(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What every rank steps of a parameter where nothing is partitioned: itself, or its float32 copy."""
        return self._copies.get(id(parameter), parameter)

    def local_weights(self) -> Pieces:
        """Of each trained parameter, flattened, (where it begins, the part of its float32 weights that this rank steps).

        Without ZeRO, where every rank steps all of them, a W-th. Views of what the next step changes.
        """
        rank, ranks = self.topology.rank, self.topology.world_size
        pieces = {}
        for name, parameter in self.engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.settings.zero_stage == 3:
                values = deepspeed.utils.safe_get_local_fp32_param(parameter).view(-1)
                start = rank * len(values)
                values = values[: max(0, parameter.ds_numel - start)]  # the last ones are filled up
            elif hasattr(parameter, "_hp_mapping"):
                mapping = parameter._hp_mapping
                start = 0 if mapping is None else mapping.lp_fragment_address.start
                values = parameter.new_empty(0) if mapping is None else mapping.get_hp_fragment()
            else:
                whole = self._whole(parameter).detach().view(-1)
                start = len(whole) * rank // ranks
                values = whole[start : len(whole) * (rank + 1) // ranks]
            if len(values):
                pieces[name] = start, values
        return pieces

    def trained_shapes(self) -> dict[str, torch.Size]:
        """The shapes of the trained parameters, whole, whatever the ZeRO stage."""
        named = self.engine.module.named_parameters()
        return {name: getattr(weight, "ds_shape", weight.shape) for name, weight in named if weight.requires_grad}

    def not_finite(self) -> str:
        """Name of a parameter of this rank that holds what is no number; "" where there is none."""
        named = [(f"encoder.{name}", getattr(p, "ds_tensor", p)) for name, p in self.engine.module.named_parameters()]
        named += [(f"centers{head_suffix(index)}", head.centers) for index, head in enumerate(self.heads)]
        return next((name for name, values in named if not torch.isfinite(values.detach()).all()), "")

    def save(self, folder: Path, model_name: str) -> list[Path]:
        """Writes this rank's parts of a checkpoint into a staged folder (checkpoint.CheckpointStore.stage).

        Returns what this rank wrote, but for the model's own files, which rank 0 writes.
        Raises OSError, on this rank alone, where they cannot be written; all collectives have then ended.
        """
        self._write_error, self._written = None, []
        self.engine.save_checkpoint(str(folder), tag=ENGINE_TAG, save_latest=False)
        weights = self.encoder_weights()
        # From here on nobody waits for anybody: this rank may fail alone.
        if self._write_error is not None:
            raise self._write_error
        for path, head, rows in self._head_rows(folder):
            checkpoint.save_rows(path, head.start, head.stop, head.partition.num_classes, rows)
            self._written.append(path / checkpoint.rows_file(head.start, head.stop))
        random_states = {"torch": torch.get_rng_state()}
        if self.topology.device.type == "cuda":
            random_states["cuda"] = torch.cuda.get_rng_state()
        save_tensors(self._rank_file(folder), random_states)
        if self.topology.is_main:
            self._save_model(folder, model_name, weights)
        return [*self._written, self._rank_file(folder)]

    def _save_model(self, folder: Path, model_name: str, weights: dict[str, torch.Tensor]) -> None:
        """Writes what tools read of a checkpoint, on rank 0. weights: `encoder_weights`."""
        checkpoint.save_encoder(folder / "encoder", model_name, self.engine.module.config, weights)

    def load(self, found: Checkpoint, seed: int) -> None:
        """Goes on from a checkpoint, whatever number of ranks and ZeRO stage it was written by.

        From the same number and stage bit for bit on CPUs in float32. Else through DeepSpeed's universal form: the same
        weights, moments, step counts and schedule; the heads' rows are found by their address. ZeRO stage 0 keeps the
        encoder's state whole, so that any number of ranks reads it, but is not converted to and from the others. Where the
        number of ranks differs, torch's global generators, from which no step draws, start anew by (seed, step, number of
        ranks, rank).

        Raises CheckpointError for parts that do not fit or must not be loaded, the same on every rank where it can be.
        """
        folder, stage = found.path, self.settings.zero_stage
        self._check_pickles(folder / ENGINE_TAG)
        was_stage = found.state.get("zero_stage", stage)
        if 0 in (stage, was_stage) and stage != was_stage:
            raise CheckpointError(
                f"{folder} was written with ZeRO stage {was_stage}, this run has stage {stage}: stages 1, 2 and 3 are "
                'converted into each other, 0 is not. Set "zero_optimization.stage" back.'
            )
        same_ranks = found.state["world_size"] == self.topology.world_size
        if found.state.get("engine_format") == UNIVERSAL:
            self._load_universal(folder)
            self._compare_encoder(folder)
        elif stage == 0 or (same_ranks and was_stage == stage):
            self._load_engine(folder)
        else:
            staging = folder.with_name(f"{folder.name}.universal.tmp")
            collectives.on_main_for_long(self.topology, to_universal, folder, staging)
            self._load_universal(staging)
            self._compare_encoder(folder)
            if self.topology.is_main:
                shutil.rmtree(staging)
        for path, head, rows in self._head_rows(folder):
            checkpoint.load_rows(path, head.start, head.stop, head.partition.num_classes, into=rows)
        if same_ranks and self._rank_file(folder).is_file():
            random_states = load_file(self._rank_file(folder))
            torch.set_rng_state(random_states["torch"])
            if "cuda" in random_states and self.topology.device.type == "cuda":
                torch.cuda.set_rng_state(random_states["cuda"])
        else:
            self.topology.seed_torch(seed, found.step)

    def _check_pickles(self, folder: Path) -> None:
        """Every file that DeepSpeed is about to unpickle, a share of them on each rank."""
        found = None
        try:
            refuse_foreign_pickles(folder, self.topology.rank, self.topology.world_size)
        except UserError as error:
            found = error
        for error in collectives.gather_objects(found, self.topology):
            if error is not None:
                raise error

    def _load_engine(self, folder: Path) -> None:
        with _plainly_named(folder) as plain:
            path, _ = self.engine.load_checkpoint(str(plain), tag=ENGINE_TAG)
        if path is None:
            raise CheckpointError(f"DeepSpeed finds no engine state in {folder / ENGINE_TAG}")

    def _load_universal(self, folder: Path) -> None:
        config = self.engine._config
        # To DeepSpeed it is a setting of the whole run; to us, of this load.
        config.load_universal_checkpoint = True
        try:
            self._load_engine(folder)
        finally:
            config.load_universal_checkpoint = False
        # At stage 3 DeepSpeed 0.19 gives every group the settings of the first, so that biases and norms would decay, and
        # all their parameters one step count, which each of them would then advance.
        optimizer = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        for group, settings in zip(optimizer.param_groups, universal.param_groups(folder / ENGINE_TAG), strict=True):
            group.update(settings)
        for state in optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    def _compare_encoder(self, folder: Path) -> None:
        """Holds the encoder, after a conversion, to the one that lies beside it in the checkpoint. Every rank calls it."""
        weights = self.encoder_weights()
        collectives.on_main(self.topology, self._compare_model, weights, folder)

    def _compare_model(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Raises CheckpointError where `encoder_weights` are not those that `_save_model` has written."""
        checkpoint.compare_weights(weights, folder / "encoder" / "encoder.safetensors")

    def _head_rows(self, folder: Path) -> list[tuple[Path, PartialFC, dict[str, torch.Tensor]]]:
        """(its folder in a checkpoint, the head, its rows by name) of each head."""
        return [
            (folder / checkpoint.head_folder(i), head, {"centers": head.centers.data, **optimizer.state_dict()})
            for i, (head, optimizer) in enumerate(zip(self.heads, self.head_optimizers, strict=True))
        ]

    def _rank_file(self, folder: Path) -> Path:
        return folder / "ranks" / checkpoint.rank_file(self.topology.rank)


def _with_whole_blocks(model: VisionTransformer, settings: DeepSpeedSettings) -> dict:
    """The JSON for blocks that are compiled, or recomputed in part: at ZeRO 3 their weights are gathered once, before them.

    So no hook breaks a block's graph, or runs once more with its forward. Nor may DeepSpeed put a linear function of its
    own for torch's, which adds biases in place; it is there so that no gathered weights are saved for the backward pass,
    which such blocks do not do anyway.
    """
    if settings.zero_stage < 3:
        return settings.json
    deepspeed.utils.set_z3_leaf_modules(model, [Block])
    return settings.json | {
        "zero_optimization": settings.json["zero_optimization"] | {"memory_efficient_linear": False}
    }


@contextlib.contextmanager
def _plainly_named(folder: Path) -> Iterator[Path]:
    """Another name of `folder`, without what would mean something in a pattern: DeepSpeed takes its paths for such."""
    with tempfile.TemporaryDirectory(prefix="mlcd_ds_") as temporary:
        link = Path(temporary) / "checkpoint"
        link.symlink_to(folder.resolve())
        yield link


def to_universal(checkpoint_folder: Path, folder: Path) -> None:
    """Writes the engine's part of a checkpoint in DeepSpeed's universal form into `folder`, which is emptied before.

    One process does it; every file must have passed `refuse_foreign_pickles`. It needs room for twice the optimizer's files.
    Raises CheckpointError where the disk has too little.
    """
    if folder.exists():
        shutil.rmtree(folder)  # of a process that died over it
    folder.mkdir()
    universal.check_room(checkpoint_folder, folder)
    with _plainly_named(checkpoint_folder) as source, _plainly_named(folder) as target:
        arguments = argparse.Namespace(
            input_folder=str(source / ENGINE_TAG),
            output_folder=str(target / ENGINE_TAG),
            num_extract_workers=1,  # more would be forks of a process that holds threads, and maybe a GPU
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            ds_to_universal.main(arguments)
    universal.make_uniform(folder / ENGINE_TAG)


def _float32_copies(optimizer: object) -> dict[int, torch.Tensor]:
    """{id(parameter): what is stepped of it} of DeepSpeed's optimizer for bfloat16 without ZeRO; empty for float32's."""
    groups = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True)
    pairs = (pair for group in groups for pair in zip(*group, strict=True))
    return {id(parameter): copy for parameter, copy in pairs}


def _averaged(stats: list[dict[str, torch.Tensor]], weights_A: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean over the micro-batches of each of the heads' statistics."""
    return {
        name: sum(micro[name] * weight for micro, weight in zip(stats, weights_A, strict=True)) / len(stats)
        for name in stats[0]
    }
