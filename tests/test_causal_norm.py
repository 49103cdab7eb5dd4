"""The de-confounded classifier: its logits by hand, its moving average, what is cached of it."""

import pytest
import torch
from test_features import make_cache

from lt_core.causal_norm import MOMENTUM, SCALE, CausalNormClassifier, causal_norm_logits
from lt_core.errors import InputError
from lt_core.features import load_cache, save_cache
from lt_core.methods import predict


@pytest.mark.parametrize(
    ("strength", "expected"), [(0, [9.3091, 12.4121]), (1, [0.0, 12.4121]), (3, [-18.6182, 12.4121])]
)
def test_logits_by_hand(strength, expected):
    x, d = torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 0.0])
    found = causal_norm_logits(x, torch.eye(2), d, strength, heads=1)
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-4, rtol=0)


def test_two_heads_are_normalised_on_their_own():
    torch.manual_seed(0)
    x, w, d = torch.randn(5, 6), torch.randn(3, 6), torch.randn(6)
    stretched = torch.tensor([10.0, 10, 10, 0.1, 0.1, 0.1])
    found = causal_norm_logits(x, w, d, 2.0)
    torch.testing.assert_close(causal_norm_logits(x * stretched, w, d * stretched, 2.0), found)
    halves = [causal_norm_logits(x[:, h], w[:, h], d[h], 2.0, heads=1) for h in (slice(3), slice(3, 6))]
    torch.testing.assert_close(found, sum(halves) / 2)
    assert not torch.allclose(causal_norm_logits(x, w * 0.1, d, 2.0), found)  # small rows are damped


def test_training_follows_the_mean_feature_and_evaluation_takes_it_away():
    torch.manual_seed(0)
    classifier, ones = CausalNormClassifier(4, 3), torch.ones(2, 4)
    classifier(ones)
    torch.testing.assert_close(classifier.direction, torch.ones(4))
    logits = classifier(ones)
    torch.testing.assert_close(classifier.direction, torch.full((4,), 1 + MOMENTUM))
    torch.testing.assert_close(logits, causal_norm_logits(ones, classifier.weight, classifier.direction, 0.0))
    classifier.eval()
    torch.testing.assert_close(classifier(ones), torch.zeros(2, 3))  # nothing but the direction
    torch.testing.assert_close(classifier.direction, torch.full((4,), 1 + MOMENTUM))
    assert "direction" in classifier.state_dict() and classifier.scale == SCALE


def test_the_cache_keeps_the_direction(tmp_path):
    direction = torch.rand(8)
    cache = make_cache(direction=direction)
    save_cache(tmp_path, cache)
    loaded = load_cache(tmp_path)
    assert torch.equal(loaded.direction, direction)
    expected = causal_norm_logits(loaded.features("test"), cache.weights, direction).argmax(1)
    assert predict(loaded, "causal_norm").tolist() == expected.tolist()
    with pytest.raises(InputError, match="this cache has no direction"):
        predict(make_cache(), "causal_norm")
    for wrong in (torch.rand(7), torch.full((8,), float("nan"))):
        with pytest.raises(InputError, match="direction"):
            save_cache(tmp_path, make_cache(direction=wrong))
