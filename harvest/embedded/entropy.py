"""The least loss that any model of the embedded language can have, from the language's own probabilities.

The generator knows the probability of every token given the tokens before it, once for each distribution. A model
that was trained on an even mixture does not know which distribution a document comes from; the best it can do is
weigh both by how well they explained the document so far:

    p(token_t | before) = sum_r w_r(t) p_r(token_t | before),   w_r(t) proportional to p_r(tokens before t)

That is exact for each document; only the mean over documents is a Monte-Carlo estimate. Averaged over the mixture
it is a lower bound that no model beats; on one distribution alone a model could only beat it by losing on the other.
"""

import numpy as np

from harvest.embedded.grammar import Draft


def ideal_losses(drafts: list[Draft]) -> np.ndarray:
    """Loss in nats of the ideal predictor at every token after the first: [n_documents, 63]."""
    probability = np.array([draft.probabilities for draft in drafts])  # [n_documents, 63, 2]
    with np.errstate(divide="ignore"):  # a document may be impossible under one of the two
        logs = np.log(probability)
    so_far = np.concatenate([np.zeros_like(logs[:, :1]), np.cumsum(logs, axis=1)], axis=1)  # [n_documents, 64, 2]
    evidence = np.logaddexp(so_far[:, :, 0], so_far[:, :, 1])
    return evidence[:, :-1] - evidence[:, 1:]


def known_distribution_losses(drafts: list[Draft]) -> np.ndarray:
    """The same for a predictor that is told which distribution each document is from: [n_documents, 63]."""
    return np.array([[-np.log(pair[int(draft.shifted)]) for pair in draft.probabilities] for draft in drafts])
