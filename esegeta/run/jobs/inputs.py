"""What a job may read: its image, its network, the records and maps of the jobs before it; each when asked for."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from esegeta import spatial
from esegeta._types import Model, Score
from esegeta.engine import check
from esegeta.run.config.building import Built
from esegeta.run.executors.child import Context
from esegeta.run.executors.status import MADE
from esegeta.run.jobs.kinds import Record
from esegeta.run.jobs.parts import (
    Entry,
    Image,
    answered,
    cached,
    entry_of,
    explanation_of,
    image_of,
    model_of,
    on_file,
    predicted,
    reference_of,
    refusals,
)
from esegeta.run.jobs.plan import record_of


def on_image(map: Tensor, x: Tensor) -> tuple[Tensor, list[Record]]:
    """Return a map of a layer on the grid of the image; the channels of a layer are added up.

    >>> a, said = on_image(torch.tensor([[1., 2.], [3., 4.]]), torch.zeros(1, 4))
    >>> a.tolist(), said[0]["event"]
    ([[4.0, 4.5, 5.5, 6.0]], 'layer')
    """
    if map.shape[1:] == x.shape[1:] and len(map) in (1, len(x)):
        return map, []
    if map.ndim != x.ndim:
        expected = f"a map with {x.ndim - 1} spatial axes"
        advice = "This place has no grid: choose a place before pooling or flattening"
        raise check.refused("place", expected, check.describe(map), advice)
    shape = tuple(map.shape)
    how = f"on the grid of the image by interpolation from {shape[1:]}"
    if len(map) > 1:
        map, how = map.sum(0, keepdim=True), f"the sum of {shape[0]} channels, {how}"
    return spatial.upsample(map, like=x), [{"event": "layer", "message": f"The map is {how}."}]


class Inputs:
    """What a job may read; nothing is read before it is asked for, and nothing twice that jobs share.

    ``image``, ``model``, ``prediction`` and ``explain`` are for jobs about one image, one target and one method: they
    are given what the job of a method is given. ``record``, ``map``, ``many`` and ``missing`` are of the jobs that a
    job comes after.

    Args:
        payload: of the job.
        context: of its worker, whose cache holds images and networks for the jobs that share them.
    """

    def __init__(self, payload: Record, context: Context) -> None:
        self._payload = payload
        self._context = context
        self._entry: Entry | None = None

    def entry(self) -> Entry:
        """Return the parts of the configuration that the job is about."""
        if self._entry is None:
            with refusals():
                self._entry = entry_of(self._payload, self._context.memory)
        return self._entry

    def image(self) -> Image:
        """Return the image, as it is in its file and as the network takes it."""
        return image_of(self._payload, self.entry(), self._device, self._context.cache)

    def model(self) -> Model:
        """Return the network."""
        self.answer()  # what it shows of the network is the same whichever job comes first
        return model_of(self.entry(), self._device, self._context.cache, self._whose())

    def _whose(self) -> list[Any]:
        """What decides about the image."""
        payload = self._payload
        return [*(payload[name] for name in ("files", "input_digest", "preprocess")), self.entry().pad]

    def answer(self) -> Any:
        """Return the network's answer to the image, computed once for the jobs of this worker that share both."""
        return answered(self.entry(), self.image(), self._device, self._context.cache, self._whose())

    def explain(self) -> tuple[Built, Score | None]:
        """Return the explanation that the method of this job is, built anew, and the score that it explains.

        Called with an image on the grid of the network, ``explain()[0](x)`` explains it, with the same baselines and
        key as the job did; its ``explain``, ``refs`` and ``keyed`` are there for who calls it otherwise. The score is
        None where every patch has its own.
        """
        with refusals():
            return explanation_of(self.entry(), self.model(), self.image())

    def prediction(self, grid: Literal["network", "file"] = "file") -> Tensor | None:
        r"""Return where the network sees the target of the job.

        Args:
            grid: "file" for the grid of the image's file, on which it is also written beside the maps; "network"
                for that of the prepared image.

        Returns:
            bool (\*S), on the CPU; None if the target has no class, or the answer of the network no grid, as that
            of a classifier. With ``patches`` other than "whole" it is of the stitched answer.
        """
        payload, entry, image = self._payload, self.entry(), self.image()

        def look() -> Tensor | None:
            found = predicted(entry, self.answer(), image)
            return None if found is None else found.cpu()

        how = [entry.method.patches, payload["patches"]] if entry.method.patches != "whole" else None
        about = [payload[name] for name in ("files", "input_digest", "model", "preprocess", "target")]
        mask = cached(self._context.cache, "seen", [*about, entry.pad, how], look, 8)
        return mask if mask is None or grid == "network" else on_file(mask, image)

    def reference(self, grid: Literal["network", "file"] = "file") -> Tensor | None:
        r"""Return where the ground truth that the configuration gives shows the target of the job.

        It does not decide about maps. A kind whose numbers depend on it says so: ``payload["reference"]`` is None or
        has a ``decides`` to be put into ``Job.decides``. When jobs are planned, ``job.given["reference"]`` is a
        function that returns that: it reads the file, so ``Job.decides`` should be a function as well.

        Args:
            grid: "file" for the grid of the image's file, on which it is also written beside the maps; "network"
                for that of the prepared image, to which the nearest label is brought.

        Returns:
            bool (\*S), on the CPU; None if the configuration has no table ``[reference]``, or no file for this
            subject.
        """
        with refusals():
            return reference_of(self._payload, self.image(), self._context.cache, self._context.memory, grid)

    @property
    def _device(self) -> torch.device:
        return torch.device(self._context.device)

    def record(self, job: str) -> Record:
        """Return the record of a job that has a result."""
        found = record_of(self._payload["folder"], job)
        if found is None or found.get("status") not in MADE:
            got = "none" if found is None else f"it {found.get('status')}"
            advice = "Mend what is wrong with that job, and run again"
            raise check.refused(self._payload["id"], f"a result of {job}", got, advice)
        return found

    def many(self) -> Iterator[tuple[str, Record]]:
        """Give those jobs before this one that have a result, with their records."""
        for job in self._payload["after"]:
            found = record_of(self._payload["folder"], job)
            if found is not None and found.get("status") in MADE:
                yield job, found

    def missing(self, made: Sequence[str]) -> dict[str, str]:
        """Return the other jobs before this one, with how they ended."""
        rest = [job for job in self._payload["after"] if job not in made]
        records = {job: record_of(self._payload["folder"], job) for job in rest}
        return {job: "not run" if found is None else str(found["status"]) for job, found in records.items()}

    def map(self, job: str, grid: Literal["network", "file"] = "network") -> Tensor:
        """Return the map of a job, which must have a result and be about the image of this one.

        Args:
            job: its id.
            grid: "network" for the map as it was computed, with all channels, on the grid of the network or of a
                layer; "file" for the one on the grid of the image's file, where NaN is what was not computed.
        """
        check.one_of("Inputs.map", "grid", grid, ("network", "file"))
        record = self.record(job)
        if not record.get("raw"):
            got, advice = f"a job of the kind {record.get('kind')!r}", "Read its record"
            raise check.refused(self._payload["id"], f"a map of {job}", got, advice)
        values: Any = np.load(Path(self._payload["folder"]) / record["raw"], allow_pickle=False)
        raw = torch.from_numpy(values)
        if grid == "network":
            return raw
        image = self.image()
        return image.prepared.back(on_image(raw, image.x.cpu())[0], record["regridding"])
