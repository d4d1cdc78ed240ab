"""Metrics of other libraries as subjects: ``quantus:SensitivityN``, ``captum:infidelity``, ``grad_cam:deletion``.

Each gets a batch of one image, the finished map, and a network whose class 0 has the score. What a library offers
under a name that stands here is put to the laws of metrics; images are in the plane, and in single precision.
"""

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esegeta._types import Score
from esegeta.conformance.adapters import peers
from esegeta.conformance.judging import MetricSubject

# From (network, images (B,C,*S), maps (B,C,*S), masks (B,1,*S)) to one number; B is 1 unless it needs more.
Judge = Callable[[nn.Module, Tensor, Tensor, Tensor], float]
TOGETHER = 4  # images, where it matters how many are run at once


class OfScore(nn.Module):
    """A score as a classifier of two classes: the first has the score, the second nothing."""

    def __init__(self, score: Score, floor: float = 0.0) -> None:
        super().__init__()
        self.score, self.floor = score, floor
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)  # some libraries ask where it is

    def forward(self, xs: Tensor) -> Tensor:
        """Return both classes of every example."""
        first = torch.stack([self.score(x.double()) for x in xs])
        return torch.stack([first, torch.zeros_like(first) + self.floor], 1).to(xs.dtype)


@dataclass(frozen=True)
class PeerMetric:
    """A metric of another library: how it judges with given options, and what ``MetricSubject`` says of it."""

    prepare: Callable[..., Judge]
    needs: tuple[str, ...] = ("score",)
    better: str = "higher"
    exact: float | None = None
    ranks: bool = False
    drawn: bool = False
    images: int = 1  # how many it needs at once; further ones are the first with its elements moved on
    steps: str = ""  # the option that says how many elements a step has
    batch: str = ""  # the option that says how many images are run at once
    decides: bool = False  # it looks at the class that wins: the other class has the mean score
    ordered: bool = False  # as ``MetricSubject`` says
    slopes: bool = False  # it multiplies maps by changes of the image: it gets them per unit of it


def _quantus(name: str, located: bool = False, **own_usual: Any) -> Callable[..., Judge]:
    usual = {
        "abs": False,
        "normalise": False,
        "disable_warnings": True,
        "display_progressbar": False,
        "features_in_step": 1,
        "perturb_baseline": 0.0,
        "return_auc_per_sample": True,
        "nr_runs": 8,
        "subset_size": 4,
        "return_aggregate": False,
        **own_usual,
    }

    def prepare(batch_size: int = 64, **options: Any) -> Judge:
        peers.torchvision()
        package = peers.package("quantus", "peers")
        kind = getattr(package, name)
        known = inspect.signature(kind.__init__).parameters
        own = {k: v for k, v in {**usual, **options}.items() if k in known}

        def judge(model: nn.Module, x: Tensor, a: Tensor, mask: Tensor) -> float:
            with peers.seeded(7), peers.quiet():
                metric = kind(**own)
                # Where a map lies is asked of one channel: it does not look at the image.
                arrays = {"x_batch": x, "a_batch": a, "s_batch": mask}
                if located:
                    arrays |= {"x_batch": a.sum(1, keepdim=True), "a_batch": a.sum(1, keepdim=True)}
                batch = {k: v.float().numpy() for k, v in arrays.items()}
                classes = np.zeros(len(x), dtype=int)
                more = {"device": "cpu", "softmax": False, "batch_size": batch_size, "channel_first": True}
                found = metric(model=model.eval(), y_batch=classes, **batch, **more)
            numbers = np.asarray(list(found.values()) if isinstance(found, dict) else found, dtype=float)
            return float(numbers[~np.isnan(numbers)].mean()) if (~np.isnan(numbers)).any() else float("nan")

        return judge

    return prepare


def _captum_infidelity(**options: Any) -> Judge:
    metrics = peers.package("captum.metrics", "test")

    def judge(model: nn.Module, x: Tensor, a: Tensor, _: Tensor) -> float:
        def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
            noise = 0.1 * torch.randn_like(inputs)
            return noise, inputs - noise

        with peers.seeded(7), peers.quiet():
            found = metrics.infidelity(model, perturb, x, a, target=0, **options)
        return float(found)

    return judge


def _torchcam(number: str) -> Callable[..., Judge]:
    def prepare(**options: Any) -> Judge:
        peers.torchvision()
        package = peers.package("torchcam.metrics", "peers")

        def judge(model: nn.Module, x: Tensor, a: Tensor, _: Tensor) -> float:
            with peers.quiet():
                metric = package.DeletionInsertionMetric(_Maps(model.eval(), a.sum(1)), **options)
                metric.update(x, 0)
                return float(metric.summary()[number])

        return judge

    return prepare


class _Maps:
    """What torch-cam asks for its maps: an extractor that has one finished map (1,*S)."""

    def __init__(self, model: nn.Module, a: Tensor) -> None:
        self.model, self.a = model, a

    def __call__(self, *_: Any, **__: Any) -> list[Tensor]:
        return [self.a]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        """There is but one."""
        return cams[0]

    def _hooks_off(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _grad_cam(remover: str) -> Callable[..., Judge]:
    """What the score loses when a share of the image becomes zero: ``percentile`` 80 means a fifth."""

    def prepare(percentile: float = 80) -> Judge:
        peers.torchvision()
        package = peers.package("pytorch_grad_cam.metrics.perturbation_confidence", "test")

        def judge(model: nn.Module, x: Tensor, a: Tensor, _: Tensor) -> float:
            remove = getattr(package, remover)(percentile, lambda image, keep: image * keep)
            metric = package.PerturbationConfidenceMetric(remove)
            with peers.quiet():
                (lost,) = metric(x, a.sum(1).numpy(), [lambda out: out[0]], model.eval())
            return -float(lost)

        return judge

    return prepare


def _per_unit(a: Tensor, x: Tensor) -> Tensor:
    return torch.where(x != 0, a / torch.where(x != 0, x, 1), 0)


MASK = ("mask",)
LIBRARIES: dict[str, dict[str, PeerMetric]] = {
    "quantus": {
        "SensitivityN": PeerMetric(_quantus("SensitivityN"), exact=1.0, images=6),
        "FaithfulnessCorrelation": PeerMetric(
            _quantus("FaithfulnessCorrelation"), exact=1.0, ranks=True, drawn=True
        ),
        "PixelFlipping": PeerMetric(
            _quantus("PixelFlipping"), better="lower", ranks=True, steps="features_in_step"
        ),
        "PointingGame": PeerMetric(_quantus("PointingGame", located=True), MASK),
        "RelevanceMassAccuracy": PeerMetric(_quantus("RelevanceMassAccuracy", located=True), MASK),
        "RelevanceRankAccuracy": PeerMetric(_quantus("RelevanceRankAccuracy", located=True), MASK),
        "AUC": PeerMetric(_quantus("AUC", located=True), MASK),
        "Sparseness": PeerMetric(_quantus("Sparseness", abs=True), ()),
        "Complexity": PeerMetric(_quantus("Complexity", abs=True), (), better=""),
        "EffectiveComplexity": PeerMetric(_quantus("EffectiveComplexity", abs=True), (), better=""),
        "Completeness": PeerMetric(_quantus("Completeness"), exact=1.0),
        "NonSensitivity": PeerMetric(_quantus("NonSensitivity"), better="lower", exact=0.0),
        "Infidelity": PeerMetric(
            _quantus("Infidelity", perturb_patch_sizes=[2], n_perturb_samples=1),
            better="lower",
            exact=0.0,
            slopes=True,
        ),
        "IROF": PeerMetric(_quantus("IROF", perturb_baseline="mean")),
        "ROAD": PeerMetric(_quantus("ROAD", percentages=[20, 50], noise=0.0), better="lower", decides=True),
    },
    "captum": {
        "infidelity": PeerMetric(
            _captum_infidelity, better="lower", exact=0.0, ranks=True, drawn=True, slopes=True
        )
    },
    "torchcam": {
        "deletion": PeerMetric(_torchcam("deletion_auc"), better="lower", ranks=True, ordered=True),
        "insertion": PeerMetric(_torchcam("insertion_auc"), ranks=True, ordered=True),
    },
    "grad_cam": {
        "RemoveMostRelevantFirst": PeerMetric(_grad_cam("RemoveMostRelevantFirst"), ranks=True, ordered=True),
        "RemoveLeastRelevantFirst": PeerMetric(
            _grad_cam("RemoveLeastRelevantFirst"), better="lower", ranks=True, ordered=True
        ),
    },
}


LIBRARIES["quantus"] = {
    name: replace(peer, batch="batch_size") for name, peer in LIBRARIES["quantus"].items()
}


def names() -> list[str]:
    """Return the metrics of other libraries that can be verified, whether or not their packages are installed."""
    return [f"{library}:{name}" for library, known in LIBRARIES.items() for name in known]


def find(library: str, name: str, options: dict[str, Any]) -> MetricSubject:
    """Return the subject of a metric of another library, with options."""
    peer = LIBRARIES[library][name]
    judge = peer.prepare(**options)

    def build(
        explain: Any, score: Score, steps: int | None = None, chunk: int | None = None, **_: Any
    ) -> Callable[..., Any]:
        def measure(x: Tensor, key: Any = None, mask: Tensor | None = None) -> Tensor:  # noqa: ARG001
            many = peer.images if chunk is None else max(peer.images, TOGETHER)
            moved = lambda t, k: t.flatten().roll(k).reshape(t.shape)
            xs = torch.stack([moved(x, k) for k in range(many)])
            maps = torch.stack([explain(one).to(x.dtype).expand(x.shape) for one in xs])
            if chunk is not None:  # one finished map for all, or its values, would not vary over images
                maps = torch.stack([(1 + k) * moved(a, k) for k, a in enumerate(maps)])
            maps = _per_unit(maps, xs) if peer.slopes else maps
            chosen = {**options}
            if steps is not None and peer.steps:
                chosen[peer.steps] = max(1, x.numel() // steps)
            if chunk is not None:
                chosen[peer.batch] = chunk
            inside = torch.ones_like(x[:1], dtype=torch.bool) if mask is None else mask[None]
            floor = (
                float(torch.stack([score(one) for one in (*xs, *(0 * xs))]).mean()) if peer.decides else 0.0
            )
            judged = judge if chosen == options else peer.prepare(**chosen)
            return torch.tensor(
                judged(OfScore(score, floor), xs, maps, inside.expand(many, *inside.shape)),
                dtype=torch.float64,
            )

        return measure

    return MetricSubject(
        f"{library}:{name}",
        build,
        peer.needs,
        peer.better,
        peer.exact,
        peer.ranks,
        bool(peer.steps),
        peer.drawn,
        planar=True,
        vectorised=False,
        slack=1e-4,
        several=bool(peer.batch),
        ordered=peer.ordered,
    )


def known(text: str) -> bool:
    """Return whether a name is that of a metric here, with options or without."""
    library, _, call = text.partition(":")
    return call.partition("(")[0].strip() in LIBRARIES.get(library.strip(), {})
