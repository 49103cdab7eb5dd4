"""BALMS (Ren et al., NeurIPS 2020): balanced softmax on frozen features and a sampler that learns.

In each step the sampler draws a batch, a copy of the classifier takes the step that this batch asks for, and
the sampler moves to where the copy does better on a class-balanced batch. Then the classifier takes its step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lt_core.baselines.heads import EPOCHS, MOMENTUM, WEIGHT_DECAY, batch_size, frozen, new_head
from lt_core.baselines.stage1 import Logits, Stage1
from lt_core.samplers import MetaSampler, epoch_batches
from lt_core.train import lr_at, step_generator

META_LEARNING_RATE = 1e-3  # of Adam


def balms(stage: Stage1, learning_rate: float, init_power: float = 0.1, seed: int = 0) -> Logits:
    """A new classifier trained with balanced softmax on what the meta sampler draws.

    The class-balanced batches come from the training images, as in the authors' CIFAR settings; theirs for
    ImageNet-LT and Places-LT learn the sampler from validation labels, which no other method here sees.
    """
    features, labels = stage.training
    head, sampler = new_head(stage, seed), MetaSampler(stage.counts, init_power)
    meta_optimiser = torch.optim.Adam(sampler.parameters(), META_LEARNING_RATE)
    velocity = {name: torch.zeros_like(weight) for name, weight in head.named_parameters()}
    log_counts = stage.counts.double().log().float()
    by_class = labels.argsort(stable=True)
    batch = batch_size(len(labels))
    total = len(labels) // batch * EPOCHS
    step = 0
    for epoch in range(EPOCHS):
        for rows in epoch_batches("class_aware", labels, batch, seed, epoch):
            classes, ones = sampler.draw(batch, generator := step_generator(seed, epoch, step))
            drawn = images_of(classes, by_class, stage.counts, generator)
            losses = cross_entropy(head(features[drawn]) + log_counts, classes, reduction="none")
            rate = learning_rate * lr_at(step, total)
            stepped, moved = sgd_step(head, velocity, (losses * ones).mean(), rate)
            after = cross_entropy(functional_call(head, stepped, (features[rows],)), labels[rows])
            meta_optimiser.zero_grad()
            after.backward(inputs=list(sampler.parameters()))
            meta_optimiser.step()

            # The draw weighs every image by 1, so the step that was tried is the plain one.
            with torch.no_grad():
                for name, weight in head.named_parameters():
                    weight.copy_(stepped[name])
                    velocity[name] = moved[name].detach()
            step += 1
    return frozen(head)


def sgd_step(
    head: nn.Module, velocity: dict[str, Tensor], loss: Tensor, rate: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The head's weights and velocity after a step of SGD, as functions of what the loss depends on."""
    weights = dict(head.named_parameters())
    gradients = torch.autograd.grad(loss, weights.values(), create_graph=True)
    moved = {
        name: MOMENTUM * velocity[name] + gradient + WEIGHT_DECAY * weights[name]
        for name, gradient in zip(weights, gradients, strict=True)
    }
    return {name: weight - rate * moved[name] for name, weight in weights.items()}, moved


def images_of(classes: Tensor, by_class: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """A random image [B] of each of the classes [B]; by_class [M]: all images, class after class."""
    first = counts.cumsum(0) - counts
    place = (torch.rand(len(classes), generator=generator) * counts[classes]).long()
    return by_class[first[classes] + place]
