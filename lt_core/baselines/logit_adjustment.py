"""Post-hoc logit adjustment (Menon et al., ICLR 2021), with strength 1 the PC softmax of the LADE paper."""

from torch import Tensor

from lt_core.baselines.stage1 import Logits
from lt_core.errors import check_counts, check_matrix


def adjust(logits: Tensor, counts: Tensor, strength: float) -> Tensor:
    """Logits [M, N] less strength times the log prior of the training set, counts [N].

    Strength 1 is the theory for training on all images alike, 0.5 for square-root sampling, whose class mass
    is n^0.5. Log probabilities, of an ensemble for instance, are logits too.
    """
    counts = check_counts("counts", counts)
    logits = check_matrix("logits", logits, columns=len(counts))
    return logits - strength * (counts.double() / counts.sum()).log().to(logits)


def adjusted(classifier: Logits, counts: Tensor, strength: float) -> Logits:
    """Any classifier (features [M, F] -> logits [M, N]) with its logits adjusted."""

    def logits(features: Tensor) -> Tensor:
        return adjust(classifier(features), counts, strength)

    return logits
