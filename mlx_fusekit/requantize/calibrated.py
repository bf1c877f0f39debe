"""Re-quantization that keeps the layers' outputs under the teacher's own activations.

The fused model grows layer by layer beside the teacher. For each group of modules with the same
inputs, the second moments of these inputs are gathered in both; the merged weights are first
changed so that they make good what the layers before did, and then quantized so that the outputs
change least (:mod:`mlx_fusekit.requantize.solver`).
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.formats.quantization import QuantizedRows
from mlx_fusekit.formats.specs import QuantSpec
from mlx_fusekit.merging.merged import MergedRows, Weight
from mlx_fusekit.merging.plan import FusePlan, WeightStep
from mlx_fusekit.progress import Progress
from mlx_fusekit.requantize.journal import Journal
from mlx_fusekit.requantize.moments import (
    MOMENTS_BYTES,
    Drift,
    InputMoments,
    Inputs,
    add_batches,
    expert_moments,
    input_groups,
    noted_inputs,
)
from mlx_fusekit.requantize.packing import packed_states, unpacked_states
from mlx_fusekit.requantize.parts import SolvedGroup, of_all_ranks, solve_group
from mlx_fusekit.requantize.ranks import Ranks
from mlx_fusekit.requantize.shelf import Held, Shelf
from mlx_fusekit.requantize.solved import ModuleResult, SolvedWeights
from mlx_fusekit.requantize.solver import Moments, Solution
from mlx_fusekit.requantize.taps import HeldInput, ModuleInput, fetched, inputs_noted
from mlx_fusekit.requantize.walk import LayerChain, TokenBatch, replayed, token_batches
from mlx_fusekit.running.model import RunningModel, place
from mlx_fusekit.running.streamed import StreamedModel, layers_of
from mlx_fusekit.running.swapped import FusedModules
from mlx_fusekit.texts.sequences import TokenSequence

#: The step of a journal before the first layer, whose own step is its number.
_BEFORE = -1


class Calibration:
    """Re-quantizes the modules of a plan one after the other.

    Args:
        plan: the fuse.
        teacher: base and adapter, in memory.
        sequences: the calibration text.
        streamed: of the teacher, where it is in memory layer by layer only.
        measured: batches that go through the layers beside the text, to be measured on.
        ranks: which share the work; None where there is no launcher.
        journal: takes what is done, and may hold what an earlier run of the same has done.
        spill: whether hidden states, and what modules are called with, wait in its folder.

    Attributes:
        fused: the modules solved so far, to run the fused model with.
        finals: hidden states behind the last layer, where the layers are a chain.
        groups: paths of modules with the same inputs, in the order they were solved in.
        resumed: modules that an earlier run had solved.
    """

    def __init__(
        self,
        plan: FusePlan,
        teacher: RunningModel,
        sequences: Sequence[TokenSequence],
        *,
        streamed: StreamedModel | None = None,
        measured: Sequence[TokenBatch] = (),
        journal: Journal | None = None,
        ranks: Ranks | None = None,
        spill: bool = False,
    ) -> None:
        self._teacher, self._streamed = teacher, streamed
        self._journal = journal
        self._shelf = journal.shelf() if journal is not None and spill else Shelf()
        self.finals: LayerChain | None = None
        self._steps = {step.module: step for step in plan.requantized}
        self._ranks = Ranks() if ranks is None else ranks
        self._measured = measured[self._ranks.number :: self._ranks.count]
        batches = token_batches(sequences)
        self._batches = self._ranks.share(batches, "batches of text")
        self._valid = [batch.valid for batch in self._batches]
        self._tokens = sum(int(batch.valid.sum()) for batch in batches)
        self._progress: Progress | None = None
        self.fused = FusedModules(teacher)
        self.solved = SolvedWeights()
        self.groups: list[tuple[str, ...]] = []
        self.resumed = self._noted = 0

    def run(self, progress: Progress | None = None) -> SolvedWeights:
        """Solve all modules.

        Args:
            progress: called with modules done and modules in all.
        """
        self._progress = progress
        if self._batches:
            self._seen()
        for path in [path for path in self._steps if path not in self.solved.experts]:
            self._solve_unseen(path)
        return self.solved

    def _seen(self) -> None:
        """Solve the modules that the calibration text reaches."""
        # No layer may be held here, or it stays in memory when others take its place.
        of_layer = self._paths_in_layers()
        inside = {path for paths in of_layer for path in paths}
        chain = self._resumed(inside)
        if chain is None and not self.solved.experts:
            self._before(of_layer)
            if self.solved.experts:
                self._note(_BEFORE)
        if chain is None:
            touched = [index for index, paths in enumerate(of_layer) if paths]
            # What lies before the first touched layer is the same in all models, or runs at once.
            start = 0 if self._streamed else min(touched, default=len(of_layer) - 1)
            chain = self._recorded(start) if of_layer else None
        if chain is not None:
            self._walk(chain, of_layer)
        self.finals = chain
        with self._trunk():
            self._rest()

    def _before(self, of_layer: Sequence[Sequence[str]]) -> None:
        """Solve embeddings, which the layers come after."""
        if self._streamed is not None and any(map(self._is_head, self._embedding_paths())):
            self.finals = self._recorded(0)
            assert self.finals is not None, "it was refused"
            for layer in range(len(of_layer)):
                with self._layer(layer):
                    self.finals.run_teacher(layer, {})
        with self._trunk():
            self._embeddings()
        self.finals = None

    def _resumed(self, inside: Collection[str]) -> LayerChain | None:
        """Take over what an earlier run has done; the layers behind it, None where none was.

        Args:
            inside: paths of modules in layers.
        """
        journal = self._journal
        if journal is None:
            return None
        in_step = min(self._ranks.all_of(len(journal.records)))
        if in_step < len(journal.records):
            journal.go_back(in_step)
        # One that has lost its states has lost all.
        if not min(self._ranks.all_of(len(journal.records))):
            journal.go_back(0)
            return None
        for record in journal.records:
            for path, result in record.modules.items():
                self.solved.experts[path] = journal.rows_of(record, path)
                self.solved.results[path] = ModuleResult(**result)
            self.groups.extend(tuple(group) for group in record.groups)
        with self._trunk():
            for path, rows in self.solved.experts.items():
                if path not in inside:
                    self.fused.put(path, rows, self._target(path))
        self._noted = len(self.groups)
        self.resumed = len(self.solved.experts)
        # Layers' modules have done their work, and were given back.
        self.fused.ever = bool(self.solved.experts)
        last = journal.records[-1]
        if last.step == _BEFORE:
            return None
        states = {name: journal.states(last, name) for name in last.states}
        with self._trunk():
            return LayerChain.resumed(
                self._teacher,
                self.fused,
                self._batches,
                last.step + 1,
                states,
                self._measured,
                self._shelf,
            )

    @property
    def measured_states(self) -> dict[str, list[mx.array]] | None:
        """Hidden states behind the last layer, of all ranks' measured batches, by whose they are.

        None where the layers are no chain.
        """
        if self.finals is None:
            return None
        first = self.finals.first_measured
        found = {"teacher": self.finals.teacher[first:], "student": self.finals.student[first:]}
        found["base"] = self.finals.base
        return {name: self._of_all(states) for name, states in found.items()}

    def _of_all(self, held: Sequence[Held]) -> list[mx.array]:
        """Batches of all ranks in their order, each rank having had its share."""
        own = [batch.get() for batch in held]
        if self._ranks.count == 1:
            return own
        by_rank = [list(unpacked_states(b)) for b in self._ranks.gathered(packed_states(own))]
        return self._ranks.in_order(by_rank)

    def _note(self, step: int, chain: LayerChain | None = None) -> None:
        """Make what was done up to a layer durable."""
        if self._journal is None:
            return
        new = self.groups[self._noted :]
        self._noted = len(self.groups)
        modules = {path: asdict(self.solved.results[path]) for group in new for path in group}
        states = {} if chain is None else chain.states(self.fused.ever)
        self._journal.done(step, modules, new, states)

    def _walk(self, chain: LayerChain, of_layer: Sequence[Sequence[str]]) -> None:
        """Solve layer by layer; of each, all is forgotten but the hidden states behind it."""
        for layer in range(chain.start, len(of_layer)):
            with self._layer(layer):
                inputs = self._teacher_inputs(chain, layer, of_layer[layer])
                chain.run_base(layer)
                if not inputs:
                    chain.run_student(layer)
            if inputs:
                # Anew: what the fused model has of its own is not needed of the teacher any more.
                with self._layer(layer, computed=False):
                    while inputs:
                        group, ours = inputs.pop(0)
                        theirs = partial(chain.student_inputs, layer, group)
                        own = theirs if self.fused.ever else None
                        self._solve_group(group, partial(fetched, ours), own, ours.clear)
                    chain.run_student(layer)
                    self.fused.give_back(of_layer[layer])
            self._note(layer, chain)

    def _layer(self, index: int, *, computed: bool = True) -> AbstractContextManager[None]:
        if self._streamed is None:
            return contextlib.nullcontext()
        return self._streamed.layer(index, computed=computed)

    def _trunk(self) -> AbstractContextManager[None]:
        return self._streamed.trunk() if self._streamed else contextlib.nullcontext()

    def _recorded(self, start: int) -> LayerChain | None:
        """The layers from ``start`` on; None where they are no chain.

        Raises:
            CheckpointError: where they are none, and are to be in memory one at a time.
        """
        with self._trunk():
            chain = LayerChain.recorded(
                self._teacher, self.fused, self._batches, start, self._measured, self._shelf
            )
        if chain is None and self._streamed is not None:
            raise CheckpointError(
                f"{self._teacher.source.path}: does more between its layers than hand on hidden "
                "states, so it runs as a whole only; give it the memory with --memory"
            )
        return chain

    def _target(self, path: str) -> QuantSpec:
        spec = self._steps[path].target_spec
        assert spec is not None, "a solved module is quantized"
        return spec

    def _is_head(self, path: str) -> bool:
        """Whether an embedding is the output head too; nothing is computed."""
        with inputs_noted(self._current([path])) as noted:
            self._teacher.model(self._batches[0].tokens)
        return bool(noted)

    def _paths_in_layers(self) -> list[list[str]]:
        layers = layers_of(self._teacher.model)
        names = {id(module): path for path, module in self._teacher.model.named_modules()}
        prefixes = [f"{names[id(layer)]}." for layer in layers if id(layer) in names]
        return [[p for p in self._steps if p.startswith(prefix)] for prefix in prefixes]

    def _current(self, paths: Sequence[str]) -> dict[str, nn.Module]:
        """Modules that stand in the model now."""
        return {path: place(self._teacher.model, path).value for path in paths}

    def _embeddings(self) -> None:
        """Embeddings come first; where they are the output head too, its inputs count."""
        for path in self._embedding_paths():
            columns = self._steps[path].shape[2]
            moments = InputMoments.zero(columns)
            ours = partial(self._whole, path, False)
            add_batches(moments, self._valid, ours, None, self._ranks)
            if moments.count:
                # As an embedding, each of its columns counts the same.
                mean = float(np.trace(moments.fused)) / columns
                moments.fused[np.diag_indices(columns)] += np.float32(mean)
            self._solve([path], moments, self._merged([path]))

    def _embedding_paths(self) -> list[str]:
        return [p for p in self._steps if hasattr(self._teacher.bare(p), "as_linear")]

    def _teacher_inputs(
        self, chain: LayerChain, layer: int, paths: Sequence[str]
    ) -> list[tuple[list[str], list[list[HeldInput]]]]:
        """The groups of a layer's modules, and the calls of the first of each, one list a batch.

        The teacher's states are then those behind the layer.
        """
        groups = []
        if paths:
            run = partial(chain.run, layer, 0)
            groups = input_groups(run, self._current(paths))
        calls = chain.run_teacher(layer, self._current([group[0] for group in groups]))
        return [(g, [[c for c in batch if c.path == g[0]] for batch in calls]) for g in groups]

    def _whole(self, path: str, fused: bool, batch: int) -> list[ModuleInput]:
        """A module's inputs when the whole model runs."""
        tokens = self._batches[batch].tokens
        run = partial(self._teacher.model, tokens)
        if self.finals is not None:
            states = self.finals.student if fused else self.finals.teacher
            run = partial(replayed, self._teacher.model, tokens, states[batch].get())
        with self.fused.active() if fused else contextlib.nullcontext():
            return noted_inputs(run, path, self._current([path])[path])

    def _rest(self) -> None:
        """What is in no layer, or in layers that are no chain: the whole model runs for it."""
        paths = [path for path in self._steps if path not in self.solved.experts]
        if not paths:
            return
        run = partial(self._teacher.model, self._batches[0].tokens)
        for group in input_groups(run, self._current(paths)):
            ours = partial(self._whole, group[0], False)
            theirs = partial(self._whole, group[0], True)
            self._solve_group(group, ours, theirs if self.fused.ever else None)

    def _solve_group(
        self,
        group: Sequence[str],
        ours: Inputs,
        theirs: Inputs | None,
        forget: Callable[[], None] | None = None,
    ) -> None:
        """Solve modules that have the same inputs.

        Args:
            group: their paths.
            ours: gives the calls of the first of them in a batch, by its index, in the teacher.
            theirs: the same in the fused model; None where it does not differ yet.
            forget: lets go of the calls, once they are counted.
        """
        if ours(0)[0].experts is not None:
            self._solve_experts(group, ours)
            return
        if self._steps[group[0]].shape[0] > 1:
            # A matrix for each head (mlx-lm's MultiLinear), which may multiply from either side.
            for path in group:
                self._solve_unseen(path)
            return
        matrices = self._merged(group)
        moments = InputMoments.zero(self._steps[group[0]].shape[2])
        if theirs is not None:
            moments.drift = Drift.zero([matrix.values for matrix in matrices], self._tokens)
        add_batches(moments, self._valid, ours, theirs, self._ranks)
        if forget is not None:
            forget()
        self._solve(group, moments, matrices)

    def _solve_unseen(self, path: str) -> None:
        """Solve a module of whose inputs nothing is known: its weights' own error counts."""
        if self._steps[path].shape[0] > 1:
            self._solve_experts([path], lambda _: [])
        else:
            moments = InputMoments.zero(self._steps[path].shape[2])
            self._solve([path], moments, self._merged([path]))

    def _solve(
        self, group: Sequence[str], moments: InputMoments, matrices: list[MergedRows]
    ) -> None:
        """Solve plain matrices, and let go of them; of no moments, by weight error."""
        self.groups.append(tuple(group))
        prepared = Moments.prepared(moments.fused, tokens=moments.count)
        solved = solve_group(matrices, prepared, moments.drift, self._ranks)
        # Solved weights as they run are not to lie beside the largest that solving took.
        del prepared
        moments.forget()
        matrices.clear()
        for path, rows in zip(group, solved.matrices, strict=True):
            self._finish(self._steps[path], [rows], [solved], moments)

    def _merged(self, group: Sequence[str]) -> list[MergedRows]:
        return [Weight.open(self._steps[path]).matrix() for path in group]

    def _solve_experts(self, group: Sequence[str], inputs: Inputs) -> None:
        """Solve expert layers, as many experts at a time as their moments fit the budget.

        The fused model may send a token to other experts than the teacher, so that their inputs
        cannot be compared; the teacher's count.
        """
        experts, _, columns = self._steps[group[0]].shape
        self.groups.append(tuple(group))

        def calls(turn: int) -> Iterator[ModuleInput]:
            for index in self._ranks.places(turn, len(self._batches)):
                yield from inputs(index)

        weights = {path: Weight.open(self._steps[path]) for path in group}
        # Of each, and of all together.
        at_once = max(1, MOMENTS_BYTES // (columns * columns * 4) - 1)
        solved: dict[str, list[Solution]] = {path: [] for path in group}
        seen = InputMoments.zero(1)
        for first in range(0, experts, at_once):
            chosen = range(first, min(first + at_once, experts))
            of_experts, everyone = expert_moments(calls, chosen, columns, self._ranks)
            seen.count, seen.skipped = everyone.count, everyone.skipped
            own = {path: list[Solution]() for path in group}
            for mine in range(self._ranks.number, len(chosen), self._ranks.count):
                prepared = Moments.prepared(of_experts[mine].fused, tokens=everyone.count)
                matrices = [weights[path].matrix(chosen[mine]) for path in group]
                # Ranks have experts of their own, and need no shares of one.
                found = solve_group(matrices, prepared, shares=1)
                for path, rows in zip(group, found.matrices, strict=True):
                    own[path].append(Solution(rows, found.error, found.nearest_error))
            of_experts.clear()
            for path in group:
                solved[path] += of_all_ranks(own[path], self._ranks)
        for path, found_of in solved.items():
            rows_of = [solution.quantized for solution in found_of]
            self._finish(self._steps[path], rows_of, found_of, seen)

    def _finish(
        self,
        step: WeightStep,
        experts: list[QuantizedRows],
        solutions: Sequence[Solution | SolvedGroup],
        moments: InputMoments,
    ) -> None:
        rows: Sequence[QuantizedRows] = experts
        if self._journal is not None:
            rows = self._journal.keep_rows(step.module, experts)
        self.solved.experts[step.module] = rows
        nearest = sum(solution.nearest_error for solution in solutions)
        ratio = sum(solution.error for solution in solutions) / nearest if nearest > 0 else 1.0
        self.solved.results[step.module] = ModuleResult(ratio, moments.count, moments.skipped)
        self.fused.put(step.module, experts, self._target(step.module))
        if self._progress is not None:
            self._progress(len(self.solved.experts), len(self._steps))
