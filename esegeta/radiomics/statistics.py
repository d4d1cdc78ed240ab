r"""Statistics of the intensities of a region. Each takes the values (n,) of its voxels and can be differentiated.

    rms(x[mask])

Variances divide by n; the kurtosis of a normal distribution is zero; percentiles are interpolated.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Values = Float[Tensor, " n"]
TAG = "stat"


def mean(v: Values) -> Tensor:
    """Return the mean.

    >>> mean(torch.tensor([1.0, 2.0, 6.0])).item()
    3.0
    """
    return v.mean()


def variance(v: Values) -> Tensor:
    """Return the mean squared distance to the mean."""
    return ((v - v.mean()) ** 2).mean()


def _moment(v: Values, power: int) -> Tensor:
    centred = v - v.mean()
    spread = (centred**2).mean()
    flat = spread <= 0
    value = (centred**power).mean() / torch.where(flat, 1.0, spread) ** (power / 2)
    return torch.where(flat, torch.zeros_like(value), value)


def skewness(v: Values) -> Tensor:
    """Return the third standardised moment; 0 where all values are equal."""
    return _moment(v, 3)


def kurtosis(v: Values) -> Tensor:
    """Return the fourth standardised moment less 3; 0 where all values are equal."""
    value = _moment(v, 4)
    return torch.where(((v - v.mean()) ** 2).mean() <= 0, value, value - 3)


def median(v: Values) -> Tensor:
    """Return the median; between two values their mean."""
    return v.quantile(0.5)


def minimum(v: Values) -> Tensor:
    """Return the smallest value."""
    return v.min()


def percentile_10(v: Values) -> Tensor:
    """Return the value that a tenth of the voxels stays below."""
    return v.quantile(0.1)


def percentile_90(v: Values) -> Tensor:
    """Return the value that a tenth of the voxels lies above."""
    return v.quantile(0.9)


def maximum(v: Values) -> Tensor:
    """Return the largest value."""
    return v.max()


def interquartile_range(v: Values) -> Tensor:
    """Return the distance from the first to the third quartile."""
    return v.quantile(0.75) - v.quantile(0.25)


def value_range(v: Values) -> Tensor:
    """Return the largest less the smallest value."""
    return v.max() - v.min()


def mean_absolute_deviation(v: Values) -> Tensor:
    """Return the mean distance to the mean."""
    return (v - v.mean()).abs().mean()


def robust_mean_absolute_deviation(v: Values) -> Tensor:
    """Return the mean absolute deviation of what lies between the 10th and the 90th percentile."""
    within = (v >= v.quantile(0.1)) & (v <= v.quantile(0.9))
    kept = within.to(v.dtype)
    centre = (v * kept).sum() / kept.sum()
    return ((v - centre).abs() * kept).sum() / kept.sum()


def median_absolute_deviation(v: Values) -> Tensor:
    """Return the mean distance to the median."""
    return (v - v.quantile(0.5)).abs().mean()


def coefficient_of_variation(v: Values) -> Tensor:
    """Return the standard deviation over the mean."""
    return variance(v).sqrt() / v.mean()


def quartile_coefficient_of_dispersion(v: Values) -> Tensor:
    """Return the distance of the quartiles over their sum."""
    low, high = v.quantile(0.25), v.quantile(0.75)
    return (high - low) / (high + low)


def energy(v: Values) -> Tensor:
    """Return the sum of squares."""
    return (v**2).sum()


def rms(v: Values) -> Tensor:
    """Return the root of the mean square.

    >>> rms(torch.tensor([3.0, 3.0])).item()
    3.0
    """
    return (v**2).mean().sqrt()


NAMES = {
    "mean": mean,
    "var": variance,
    "skew": skewness,
    "kurt": kurtosis,
    "median": median,
    "min": minimum,
    "p10": percentile_10,
    "p90": percentile_90,
    "max": maximum,
    "iqr": interquartile_range,
    "range": value_range,
    "mad": mean_absolute_deviation,
    "rmad": robust_mean_absolute_deviation,
    "medad": median_absolute_deviation,
    "cov": coefficient_of_variation,
    "qcod": quartile_coefficient_of_dispersion,
    "energy": energy,
    "rms": rms,
}


def features(values: Values) -> dict[str, float]:
    """Compute all of them, NaN where there are no voxels."""
    if not len(values):
        return dict.fromkeys(NAMES, float("nan"))
    return {name: float(fn(values)) for name, fn in NAMES.items()}
