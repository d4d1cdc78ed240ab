"""Dreams of papers and of tools, each a few parts put together: (objective, start) -> dream."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esegeta import random, spatial
from esegeta._registry import Cost, recipe
from esegeta._types import Score
from esegeta.dreams import distortions, optimisers, parametrisations, regularisers
from esegeta.dreams.climbing import Dream, ascend
from esegeta.engine import check

Start = Tensor | Callable[[random.Key], Tensor]


def _once(steps: int) -> Cost:
    return Cost(gradients=steps)


@recipe(
    example={"steps": 3, "jitter": 1}, cost=_once, paper="Natekar, Kori, Krishnamurthi 2020, arXiv:1909.01065"
)
def natekar(
    objective: Score,
    start: Start,
    *,
    steps: int = 256,
    jitter: int = 8,
    degrees: float | int = 10.0,
    template: Tensor | None = None,
    weights: tuple[float, float, float] = (0.3, 0.3, 0.1),
    spacing: spatial.Spacing | None = None,
) -> Callable[..., Dream]:
    """Maximise a filter with jitter, rotation, total variation, style and weight decay, as for brain tumours.

    Args:
        objective: such as ``dreams.objectives.channel(model, place, k)``.
        start: the image, or a function from a key to it.
        steps: of Adam with rate 0.05.
        jitter: how far the image moves from step to step, in voxels; 0 for none.
        degrees: how far it turns; 0 for none.
        template: the image whose style is to be kept, such as the mean of the data.
        weights: of total variation, of style and of the squares, as ratios of gradients: sums over voxels grow with
            the image where the mean of a filter does not, so the paper's 1e-5 and 1e-4 leave nothing of a volume.
        spacing: mm per voxel.

    Example:
        >>> dream = natekar(lambda x: x[0, 2, 2], torch.zeros(1, 5, 5), steps=5, jitter=1)
        >>> bool(dream(key=3).image[0, 2, 2] > 0)
        True
    """
    rough, alike, large = weights
    penalties: list[tuple[float | regularisers.Relative, regularisers.Penalty]] = [
        (regularisers.relative(rough), regularisers.total_variation(spacing=spacing)),
        (regularisers.relative(large), regularisers.l2()),
    ]
    if template is not None:
        penalties.append((regularisers.relative(alike), regularisers.style(template)))
    changes = [distortions.jitter(jitter)] if jitter else []
    if degrees:
        changes.append(distortions.rotation(degrees, spacing=spacing))
    return ascend(objective, start, steps=steps, distortions=changes, penalties=penalties)


@recipe(example={"steps": 3}, cost=_once, paper="Ozbulak 2019, PyTorch CNN visualizations")
def layer_visualisation(objective: Score, start: Start, *, steps: int = 30) -> Callable[..., Dream]:
    """Maximise a filter by a few steps of Adam with rate 0.1 and a decay of 1e-6.

    Args:
        objective: such as ``dreams.objectives.channel(model, place, k)``.
        start: the image, or a function from a key to it.
        steps: how many.

    Example:
        >>> round(layer_visualisation(lambda x: x.sum(), torch.zeros(1, 1), steps=2)().image.item(), 3)
        0.2
    """
    return ascend(objective, start, steps=steps, optimiser=optimisers.adam(0.1, decay=1e-6))


@recipe(example={"steps": 3}, cost=_once, paper="Ozbulak 2019, PyTorch CNN visualizations")
def deep_dream(
    objective: Score, start: Start, *, steps: int = 250, rate: float | int = 12.0
) -> Callable[..., Dream]:
    """Enhance in an image what an objective sees, by plain steps along the gradient with a decay of 1e-4.

    Args:
        objective: such as ``dreams.objectives.channel`` or ``layer_norm``.
        start: the image.
        steps: how many.
        rate: of a step, which has to fit the scale of the objective.

    Example:
        >>> deep_dream(lambda x: x.sum(), torch.zeros(1, 1), steps=1)().image.item()
        12.0
    """
    return ascend(objective, start, steps=steps, optimiser=optimisers.sgd(rate, decay=1e-4))


@recipe(
    example={"steps": 3, "pad": 0, "jitter": 1},
    cost=_once,
    paper="Olah, Mordvintsev, Schubert 2017, Feature visualization",
    also=("lucent", "lucid"),
)
def render(
    objective: Score,
    start: Start,
    *,
    steps: int = 512,
    bounds: tuple[float, float] | None = None,
    pad: int = 12,
    jitter: int = 8,
    spacing: spatial.Spacing | None = None,
) -> Callable[..., Dream]:
    """Maximise an objective over waves, kept in a range of intensities, with frame, jitter, scaling and rotation.

    Args:
        objective: any score.
        start: the image, or a function from a key to it, such as ``dreams.starts.noise``.
        steps: of Adam with rate 0.05.
        bounds: the range of intensities of the data, None for none.
        pad: width of the frame, in voxels; a network that takes only multiples of 8 or 16 takes such a frame.
        jitter: how far the image moves, and half as far again at the end.
        spacing: mm per voxel.

    Example:
        >>> dream = render(lambda x: x.mean(), torch.zeros(1, 4, 4), steps=3, pad=0, jitter=1)
        >>> bool(dream().value > 0)
        True
    """
    ways = parametrisations.fourier(spacing=spacing)
    if bounds is not None:
        ways = parametrisations.composed(ways, parametrisations.bounded(*bounds))
    changes = [distortions.padding(pad)] if pad else []
    changes += [
        distortions.jitter(jitter),
        distortions.scaling(0.9, 1.1),
        distortions.rotation(10, spacing=spacing),
    ]
    changes.append(distortions.jitter(max(1, jitter // 2)))
    return ascend(objective, start, steps=steps, parametrisation=ways, distortions=changes)


@recipe(
    example={"steps": 3, "spectrum": torch.ones(1, 4, 6)},
    cost=_once,
    paper="Fel et al. 2023, arXiv:2306.06805",
)
def phases(
    objective: Score,
    start: Start,
    *,
    spectrum: Tensor,
    steps: int = 256,
    jitter: int = 0,
    noise: float | int = 0.0,
) -> Callable[..., Dream]:
    """Maximise an objective over phases alone, with the magnitudes of the data (MACO).

    Args:
        objective: any score.
        start: ``dreams.starts.phases(spectrum)``, or an image whose phases are taken.
        spectrum: from ``dreams.spectrum``.
        steps: of Adam with rate 0.05.
        jitter: how far the image moves from step to step, in voxels.
        noise: standard deviation of what is added at every step.

    Example:
        >>> from esegeta.dreams import starts
        >>> magnitude = torch.ones(1, 8)
        >>> found = phases(lambda x: x[0, 3], starts.phases(magnitude), spectrum=magnitude, steps=50)(key=1)
        >>> bool(found.value > 2)
        True
    """
    changes: list[distortions.Distortion] = [distortions.jitter(jitter)] if jitter else []
    sigma = check.non_negative("dreams.phases", "noise", noise)
    if sigma:
        changes.append(
            lambda x, key: x + sigma * random.normal(key, tuple(x.shape), dtype=x.dtype, device=x.device)
        )
    return ascend(
        objective, start, steps=steps, parametrisation=parametrisations.maco(spectrum), distortions=changes
    )


@recipe(
    example={"steps": 3},
    cost=_once,
    paper="Mahendran, Vedaldi 2016, IJCV 120",
    also=("inverted_representation",),
)
def inversion(
    objective: Score,
    start: Start,
    *,
    steps: int = 200,
    rate: float | int = 0.1,
    bound: float | int = 1e-7,
    smooth: float | int = 1e-8,
) -> Callable[..., Dream]:
    """Find an image that a network cannot tell from another, smooth and bounded.

    Adam, whose rate falls tenfold after every two fifths of the steps: the plain steps of rate 1e4 that tools take
    fit one network alone.

    Args:
        objective: ``dreams.objectives.representation(model, place, image)``.
        start: small noise, such as ``dreams.starts.noise(image.shape, sigma=0.1)``.
        steps: how many.
        rate: of the first ones.
        bound: weight of the sixth powers.
        smooth: weight of the squared differences.

    Example:
        >>> aim = torch.tensor([[1.0, -1.0]])
        >>> found = inversion(lambda x: -(x - aim).square().sum(), torch.zeros(1, 2))()
        >>> torch.allclose(found.image, aim, atol=0.01)
        True
    """
    begin = check.non_negative("dreams.inversion", "rate", rate)
    fifth = max(1, 2 * steps // 5)
    penalties = [
        (float(bound), regularisers.power(alpha=6)),
        (float(smooth), regularisers.total_variation(beta=2, isotropic=True)),
    ]
    climbing = optimisers.adam(lambda k: begin * 0.1 ** (k // fifth))
    return ascend(objective, start, steps=steps, penalties=penalties, optimiser=climbing)


@recipe(example={"steps": 3}, cost=_once, paper="Hamblin et al. 2024, Feature accentuation, arXiv:2402.10039")
def accentuation(
    objective: Score,
    start: Tensor,
    *,
    steps: int = 100,
    near: float | int = 0.1,
    jitter: int = 2,
    spacing: spatial.Spacing | None = None,
) -> Callable[..., Dream]:
    """Bring out in a given image what an objective sees there: waves move, and the way from the image costs.

    Args:
        objective: any score.
        start: the image.
        steps: of Adam with rate 0.05.
        near: the pull back to the image, as a ratio of gradients.
        jitter: how far the image moves from step to step, in voxels; 0 for none.
        spacing: mm per voxel.

    Example:
        >>> image = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
        >>> found = accentuation(lambda x: x[0, 1], image, steps=5, jitter=0)()
        >>> bool(found.value > 1)
        True
    """
    image = check.tensor("dreams.accentuation", "start", start)
    return ascend(
        objective,
        image,
        steps=steps,
        parametrisation=parametrisations.fourier(spacing=spacing),
        distortions=[distortions.jitter(jitter)] if jitter else [],
        penalties=[(regularisers.relative(near), lambda x: (x - image.to(x)).square().sum())],
    )


@recipe(
    example={"steps": 2, "number": 2},
    cost=lambda steps, number: Cost(gradients=steps * number),
    paper="Mordvintsev, Olah, Tyka 2015, Inceptionism",
)
def octaves(
    objective: Score,
    start: Tensor,
    *,
    steps: int = 20,
    number: int = 4,
    factor: float | int = 1.4,
    rate: float | int = 0.05,
    jitter: int = 4,
    multiple: int = 1,
) -> Callable[..., Dream]:
    """Dream from an image at growing sizes, so that what is seen appears at many scales (DeepDream).

    At each size the image itself is taken anew and only what was dreamed into it is enlarged. Steps have the same
    length at every size: the gradient is divided by its root mean square.

    Args:
        objective: that takes images of any size, such as ``dreams.objectives.layer_norm(model, place)``.
        start: the image, of the largest size.
        steps: at each size.
        number: of sizes.
        factor: from one size to the next.
        rate: of a step.
        jitter: how far the image moves from step to step, in voxels; 0 for none.
        multiple: of which sizes have to be, for networks that halve the grid.

    Example:
        >>> found = octaves(lambda x: x.square().mean(), torch.ones(1, 8, 8), number=2, steps=2, jitter=0)()
        >>> found.image.shape, bool(found.value > 1)
        (torch.Size([1, 8, 8]), True)
    """
    where = "dreams.octaves"
    image = check.finite(where, "start", spatial.image(where, "start", start), "Begin from an image")
    n, unit = check.positive_count(where, "number", number), check.positive_count(where, "multiple", multiple)
    if not isinstance(factor, (int, float)) or not factor > 1:
        raise check.refused(where, "factor > 1", repr(factor), "1.4 is usual")
    changes = [distortions.jitter(jitter)] if jitter else []
    climbing = optimisers.normalised(optimisers.sgd(rate))
    sizes = [_smaller(image.shape[1:], float(factor) ** -o, unit) for o in reversed(range(1, n))]

    def dream(key: random.Key = 0) -> Dream:
        added, found = None, None
        for o, size in enumerate([*sizes, tuple(image.shape[1:])]):
            base = _resized(image, size)
            x = base if added is None else base + _resized(added, size)
            found = ascend(objective, x, steps=steps, distortions=changes, optimiser=climbing)(
                random.fold_in(key, o)
            )
            added = found.image - base
        assert found is not None
        return found

    return dream


def _smaller(size: Sequence[int], factor: float, unit: int) -> tuple[int, ...]:
    return tuple(max(unit, round(n * factor / unit) * unit) for n in size)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return spatial.upsample(x, like=x.new_empty(len(x), *size))
