"""Every conversation weighs the same (LongAlign, arXiv 2401.18058, section 3.2), computed from the runs, not from the text.

With M conversations in a step, N_i learned tokens in conversation i and L_i the sum of their losses, LongAlign wants

    L = 1/M sum_i L_i / N_i

The mean over the learned tokens of a packed sample gives a conversation the weight of its length instead. LongAlign multiplies each
token's loss by K / (N_i M), sums inside each of the K packs and takes the mean over the packs; its code takes K and M from the packs
of one step as the ranks hold them, which is right for one pack a rank and without gradient accumulation only. Here each learned token
gets the weight w = 1/N_i, and the loss of a step is sum(w x loss) / sum(w) over all ranks and micro-batches. That is the same number:
K cancels, and the weights of a conversation add up to 1, so sum(w) is M, a whole number however the tokens are split over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.sidecar import Runs

__all__ = ["learned_tokens", "loss_weights"]

IntArray = npt.NDArray[np.int64]


def learned_tokens(runs: Runs, sample: int, lengths: Sequence[int], *, apart: bool) -> IntArray:
    """Learned tokens N_i of each conversation of a sample, int64 [conversations].

    The first token of a sample is nobody's label, so it does not count.

    Args:
        runs: of a sidecar or a plan.
        sample: its number.
        lengths: tokens of each conversation, in order (`PackedSamples.document_lengths`).
        apart: conversations do not see each other (`cross_document_mask`): then no first token of one is learned.
    """
    rows = runs.rows(sample)
    flag = runs.loss[rows].astype(np.int64)
    end = np.cumsum(runs.length[rows], dtype=np.int64)
    learned = np.cumsum(flag * runs.length[rows])  # up to the end of each run

    def before(place: IntArray) -> IntArray:
        """Learned tokens in front of each place of the sample."""
        run = np.minimum(np.searchsorted(end, place, side="left"), len(end) - 1)
        return np.asarray(learned[run] - flag[run] * (end[run] - place))

    stops = np.cumsum(lengths, dtype=np.int64)
    starts = stops - np.asarray(lengths, np.int64)
    return before(stops) - before(starts + 1 if apart else np.maximum(starts, 1))


def loss_weights(
    runs: Runs, sample: int, lengths: Sequence[int], places: IntArray, loss_mask: npt.NDArray[np.bool_], *, apart: bool
) -> tuple[npt.NDArray[np.float32], int]:
    """The weight of each label of one rank's share of a sample, and how many conversations of the sample are learned from.

    Args:
        runs: of a sidecar.
        sample: its number.
        lengths: tokens of each conversation, in order. What stands behind them (padding) has weight 0.
        places: where in the sample the tokens stand whose labels are the next ones, int64 [places]; -1 is a filler.
        loss_mask: which of these labels are learned, bool [places].
        apart: as in `learned_tokens`.

    Returns:
        float32 [places]: 1/N_i for a learned label of conversation i, else 0, and the number of conversations with N_i > 0, to which
        the weights of all shares of the sample add up.
    """
    count = learned_tokens(runs, sample, lengths, apart=apart)
    weight = np.divide(1.0, count, out=np.zeros(len(count)), where=count > 0)
    conversation = np.searchsorted(np.cumsum(lengths, dtype=np.int64), places + 1, side="right")
    of_place = np.append(weight, 0.0)[conversation]  # behind the last: padding
    return np.where(loss_mask, of_place, 0.0).astype(np.float32), int((count > 0).sum())
