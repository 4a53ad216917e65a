"""Generation with transformers, by `sstoken.measure.generation`."""

from collections.abc import Collection, Iterator, Sequence

from sstoken.measure.branches import Branch, Continuation, IdArray
from sstoken.measure.generation import GreedyDecoder
from sstoken.measure.rope import longest
from sstoken.stages.backends import BackendOptions
from sstoken.stages.backends.base_models import loaded, pick_device
from sstoken.stages.backends.generation import Generator


class HFGenerator(Generator):
    """Greedy generation from a transformers causal language model."""

    def __init__(self, options: BackendOptions) -> None:
        """Load the checkpoint; an adapter's base stays in memory for the next adapter."""
        self._model = loaded(options, pick_device(options.device)).model
        self._decoder = GreedyDecoder(
            self._model, max_length=self.max_length, batch_tokens=options.batch_tokens
        )

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    @property
    def dtype(self) -> str:
        """See `Generator.dtype`."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def max_length(self) -> int | None:
        """See `Generator.max_length`."""
        return longest(self._model.config)

    def candidates(
        self, sequences: Sequence[IdArray], positions: Sequence[IdArray], count: int
    ) -> list[IdArray]:
        """See `Generator.candidates`. Takes one forward pass per sequence."""
        pairs = zip(sequences, positions, strict=True)
        return [self._decoder.candidates(ids, at, count) for ids, at in pairs]

    def continue_greedily(
        self,
        sequences: Sequence[IdArray],
        branches: Sequence[Branch],
        stop: Collection[int],
        max_new_tokens: int,
    ) -> Iterator[tuple[int, Continuation]]:
        """See `Generator.continue_greedily`."""
        yield from self._decoder.continue_greedily(sequences, branches, stop, max_new_tokens)
