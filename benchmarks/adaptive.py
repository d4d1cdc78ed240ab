"""What is left unexplained by integrated gradients, against the number of gradients.

Fixed quadratures with several numbers of steps, then ``esegeta.integrated`` to several tolerances, on the real
network. Residuals are in percent of F(x) - F(baseline). Claim: the tolerance of 1 % takes fewer gradients than
the 50 that captum takes by default (Gauss-Legendre), and leaves less.

A fixed quadrature needs only the slope of the score along the line for its residual. Rules share nodes, so
each is computed once; the residual of one of them is checked against the attribution itself.
"""

import torch

import esegeta as eg
from _measure import arguments, done, progress, real_task, setting, table
from esegeta.quadrature import RULES, nodes_and_weights

TOLERANCES = (0.05, 0.02, 0.01)


def main():
    options = arguments(__doc__, size=96)
    steps = (4, 8) if options.quick else (8, 16, 32, 50)
    task = real_task(options.size)
    line = task.x - task.baseline
    with torch.no_grad():
        difference = (task.score(task.x) - task.score(task.baseline)).item()

    slope = eg.gradient(task.score)
    along = eg.batched(lambda t: (slope(task.baseline + t * line).double() * line).sum())
    known: dict[float, float] = {}

    def residual(rule: str, n: int) -> float:
        nodes, weights = nodes_and_weights(rule, n)
        keys = [round(float(t), 9) for t in nodes]
        missing = [(k, t) for k, t in zip(keys, nodes, strict=True) if k not in known]
        if missing:
            rates = along(torch.tensor([t for _, t in missing], dtype=task.x.dtype))
            known.update(zip((k for k, _ in missing), rates.tolist(), strict=True))
        total = sum(w * known[k] for k, w in zip(keys, weights, strict=True))
        return 100 * (total / difference - 1)

    print(f"residual of integrated gradients in percent of F(x) - F(baseline), {setting(options)}\n")
    rows = []
    for rule in RULES:
        row = [rule]
        for n in steps:
            progress(f"{rule}, {n} steps")
            row.append(f"{residual(rule, n):+.3f}")
        rows.append(row)
    done()
    table(("rule, gradients", *map(str, steps)), rows)

    check = eg.integrated_gradients(task.score, steps=steps[0])(task.x, task.baseline).double().sum().item()
    print(
        f"gauss-legendre with {steps[0]} steps, from the attribution: {100 * (check / difference - 1):+.3f}\n"
    )

    rows = []
    for tolerance in TOLERANCES:
        progress(f"tolerance {tolerance}")
        found = eg.adaptive_report(task.score, tolerance=tolerance)(task.x, task.baseline)
        left = found.attribution.double().sum().item() / difference - 1
        rows.append((f"{100 * tolerance:g} %", int(found.evaluations), f"{100 * left:+.3f}"))
    done()
    table(("tolerance", "gradients", "residual"), rows)
    if not options.quick:
        print(f"gauss-legendre with 50 gradients: {residual('gauss-legendre', 50):+.3f}")


if __name__ == "__main__":
    main()
