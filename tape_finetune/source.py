"""A split as the head sees it: features made by the base model when asked for, or made once and kept."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plm.memory import FreedMemory
from megatron_plm.parallel.mesh import World
from tape_finetune.batching import length_batches, pack
from tape_finetune.data import Example
from tape_finetune.model import TaskModel
from tape_finetune.progress import track

RESIDUES_AT_A_TIME = 4096  # of one pass without gradients
ALONE = World(0, 1, torch.device("cpu"), None)  # one process; the model says itself which device it is on

Result = TypeVar("Result")


class Source:
    """The examples of one split, and the outputs of a model for any of them."""

    def __init__(
        self,
        model: TaskModel,
        examples: Sequence[Example],
        *,
        batch_size: int | None = None,
        world: World = ALONE,
    ) -> None:
        """`batch_size`, if given, is the most proteins of a pass without gradients. The processes of `world` all have
        the same model and examples."""
        self._model = model
        self._batch_size = batch_size
        self.world = world
        self.examples = examples
        self._kept: list[Tensor] | None = None  # of each example [1, D] or [L, D], by the head's level

    def batches(self) -> list[list[int]]:
        """Indices of all examples in batches for a pass without gradients, similar lengths together."""
        lengths = [len(example.sequence) for example in self.examples]
        return [batch.tolist() for batch in length_batches(lengths, RESIDUES_AT_A_TIME, self._batch_size)]

    def keep_features(self, name: str) -> None:
        """Compute the features of all examples once; from here on the base model is not asked any more. Collective.

        They stay in memory: for each protein one vector of the features' width, for tasks on residues one a residue,
        in float32. The weights of attention, of which there are more than memory holds, are computed again each time.
        """
        if self._model.reads == "attention":
            return
        batches = self.batches()
        computed = self.share_out(batches, lambda indices: self.features(indices).cpu(), f"features of {name}")
        kept: dict[int, Tensor] = {}
        for indices, features in zip(batches, computed, strict=True):
            kept.update(zip(indices, features.split(self._rows(indices)), strict=True))
        self._kept = [kept[index] for index in range(len(self.examples))]

    @torch.no_grad()
    def share_out(
        self, batches: Sequence[list[int]], work: Callable[[list[int]], Result], description: str
    ) -> list[Result]:
        """`work` of each batch, in their order: each process does some of them, and all get what the others made.
        Collective."""
        rank, size = self.world.rank, self.world.size
        memory, mine = FreedMemory(), []
        for indices in track(batches[rank::size], description):
            mine.append(work(indices))
            memory.bound()
        if size == 1:
            return mine
        everyones: list[list[Result]] = [[]] * size
        dist.all_gather_object(everyones, mine)
        return [everyones[number % size][number // size] for number in range(len(batches))]

    def features(self, indices: Sequence[int]) -> Tensor:
        """What the head reads of these examples, on the model's device: [n, D] or [R, D]."""
        if self._kept is not None:
            return torch.cat([self._kept[index] for index in indices]).to(self._model.device)
        return self._model.features(pack(self.chosen(indices), self._model.base.tokenizer).to(self._model.device))

    def outputs(self, indices: Sequence[int]) -> Tensor:
        """The head's outputs for these examples, on the CPU, where their labels are."""
        examples = self.chosen(indices)
        return self._model.outputs(self.features(indices), examples).cpu()

    def chosen(self, indices: Sequence[int]) -> list[Example]:
        """The examples of these indices."""
        return [self.examples[index] for index in indices]

    def _rows(self, indices: Sequence[int]) -> list[int]:
        return [self._model.num_rows(example) for example in self.chosen(indices)]
