"""The names that are promised, with their signatures; documentation and annotations of all of them."""

import inspect
import types

from together import together

import esegeta as eg
from esegeta import zoo
from esegeta._registry import METHODS, REDUCERS, TRANSFORMS

# Name, positional parameters, keyword-only parameters, as users write them.
PROMISED = [
    ("from_module", "module output", ""),
    ("models.from_module", "module output", ""),
    ("models.parametrised", "module output", ""),
    ("batched", "explain in_dims", ""),
    ("explained", "explain examples", "key"),
    ("execution", "", "chunk memory layout evaluation precision progress deadline compile"),
    ("on_trees", "method", ""),
    ("find_method", "name", ""),
    (
        "method",
        "",
        "refs key axioms needs example paper also place shape rewrites differentiable family cost numbers "
        "contributions",
    ),
    ("transform", "", "refs key preserves example paper shape family cost"),
    ("reducer", "", "output mask differentiable example family"),
    ("gradient", "score", ""),
    ("saliency", "score", ""),
    ("input_x_gradient", "score", ""),
    ("integrated_gradients", "score", "steps rule"),
    ("adaptive_integrated_gradients", "score", "tolerance max_runs"),
    ("adaptive_report", "score", "tolerance max_runs"),
    ("guided_integrated_gradients", "score", "steps fraction distance"),
    ("blur_integrated_gradients", "score", "sigma steps spacing rule"),
    ("expected_gradients", "score", "samples"),
    ("gradient_shap", "score", "samples noise"),
    ("idgi", "score", "steps"),
    ("feature_shuffling", "score", "features samples"),
    ("feature_permutation", "score", "features"),
    ("meaningful_perturbation", "score", "steps size spacing fill least edges"),
    ("extremal_perturbation", "score", "area mode steps mask fill score_scale"),
    ("feature_ablation", "score", "features fill"),
    ("occlusion", "score", "size stride spacing"),
    ("gaussian_occlusion", "score", "size stride spacing fade"),
    ("locality", "score x", ""),
    ("with_standard_error", "explain", ""),
    ("rise", "score", "cells keep samples estimator antithetic tolerance"),
    ("ablation_cam", "score place", "relative"),
    ("cam", "score place", "exact"),
    ("conductance", "score place", "steps"),
    ("eigen_cam", "score place", ""),
    ("eigen_grad_cam", "score place", ""),
    ("elementwise_grad_cam", "score place", ""),
    ("fem", "score place", "k show"),
    ("grad_cam", "score place", ""),
    ("contrastive_excitation_backprop", "score place", "contrast"),
    ("deconvolution", "score", ""),
    ("deep_lift", "score", ""),
    ("deep_lift_reveal_cancel", "score", ""),
    ("deep_lift_shap", "score", ""),
    ("excitation_backprop", "score place", ""),
    ("full_grad", "score", ""),
    ("guided_backprop", "score", ""),
    ("guided_grad_cam", "score place", ""),
    ("layer_activation_guided_backprop", "score place", "unit"),
    ("lrp", "score", "composite"),
    ("full_gradient", "score", ""),
    ("grad_cam_plus_plus", "score place", ""),
    ("hires_cam", "score place", ""),
    ("internal_influence", "score place", "steps rule"),
    ("layer_activation", "score place", ""),
    ("layer_cam", "score place", ""),
    ("layer_gradient", "score place", ""),
    ("layer_gradient_x_activation", "score place", ""),
    ("neuron_conductance", "score place", "neuron steps rule"),
    ("random_cam", "score place", ""),
    ("score_cam", "score place", "weights temperature"),
    ("seg_eigen_cam", "score place", ""),
    ("seg_xres_cam", "score place", "window pool"),
    ("shapley_cam", "score place", ""),
    ("channel_shapley", "score", ""),
    ("exact_shapley", "score", "features"),
    ("hsic_attribution", "score", "features samples"),
    ("kernel_shap", "score", "features samples tolerance"),
    ("lime", "score", "features samples width ridge"),
    ("partition_shap", "score", "features tree max_runs"),
    ("shapley_sampling", "score", "features samples tolerance"),
    ("sobol_attribution", "score", "features samples"),
    ("xgrad_cam", "score place", ""),
    ("xrai", "score", "steps scales minimum reach spacing"),
    ("mark", "z label", ""),
    ("places", "score x", ""),
    ("all_places", "score x", "grids"),
    ("tap", "score place", ""),
    ("replace", "score place", ""),
    ("nudge", "score place", ""),
    ("split", "score place", "at"),
    ("at", "method place", ""),
    ("activation_and_gradient", "score place", ""),
    ("upsample", "map", "like"),
    ("fuse", "explains", "by"),
    ("smooth", "explain", "noise samples"),
    ("smooth_squared", "explain", "noise samples"),
    ("variance", "explain", "noise samples"),
    ("over_baselines", "explain", ""),
    ("absolute", "explain", ""),
    ("positive", "explain", ""),
    ("negative", "explain", ""),
    ("reduce_channels", "explain", "by"),
    ("regions", "explain segments", "reach least spacing"),
    ("noise_grad", "build parameters", "noise samples"),
    ("fusion_grad", "build parameters", "noise samples input_noise input_samples"),
    ("reducers.predicted_class_sum", "model target", "at dynamic exclusive"),
    ("reducers.otsu_sum", "model", "part at dynamic"),
    ("reducers.class_sum", "model target", "exclusive"),
    ("reducers.class_mean", "model target", "of exclusive"),
    ("reducers.voxel", "model target index", "exclusive"),
    ("reducers.region", "model target mask", "average exclusive"),
    ("reducers.component", "model target k", "at dynamic exclusive"),
    ("reducers.boundary", "model target", "at dynamic exclusive"),
    ("reducers.soft_count", "model target", "exclusive"),
    ("reducers.margin", "model target other mask", ""),
    ("reducers.log_probability", "model target", "mask exclusive"),
    ("reducers.finer", "model target", "at dynamic k alpha"),
    ("reducers.negative_loss", "model labels", "kind exclusive"),
    ("reducers.uncertainty", "model", "exclusive"),
    ("reducers.uncertain_band", "model target", "at low high dynamic exclusive"),
    ("reducers.difference", "model other target", "at mask exclusive"),
    ("uncertainty.dropout", "module", "output rate"),
    ("uncertainty.monte_carlo", "model", "samples link threshold"),
    ("uncertainty.augmented", "model changes", ""),
    ("uncertainty.ensemble", "models", ""),
    ("uncertainty.conformal.prediction_sets", "calibration", "alpha per_class"),
    ("uncertainty.conformal.outer_mask", "calibration", "alpha"),
    ("uncertainty.conformal.inner_mask", "calibration", "alpha"),
    ("reducers.predicted_count", "model target", "exclusive"),
    ("reducers.predicted_dice", "model target", "at exclusive"),
    ("reducers.logit", "model target", "exclusive"),
    ("reducers.probability", "model target", "exclusive"),
    ("reducers.predicted_mask", "z target", "exclusive"),
    ("axioms.completeness", "explain score", ""),
    ("axioms.dummy", "explain ignored", ""),
    ("axioms.linearity", "method score other", "weights"),
    ("axioms.symmetry", "explain permutation", ""),
    ("axioms.shift", "method score offset", ""),
    ("axioms.sensitivity_a", "explain score", ""),
    ("axioms.conservation", "explain score", ""),
    ("axioms.sensitivity_n", "explain score subset", ""),
    ("axioms.efficiency_of_regions", "explain score labels", ""),
    ("axioms.monotonicity", "explain", ""),
    ("axioms.continuity", "explain step", ""),
    ("axioms.scale_of_output", "method score", "factor"),
    ("axioms.implementation_invariance", "method score same", ""),
    ("axioms.class_sensitivity", "method score other", ""),
    ("axioms.parameter_dependence", "method score randomised", ""),
    ("axioms.translation_equivariance", "method score offsets", ""),
    ("axioms.affine_equivariance", "method score matrix", ""),
    ("axioms.exact.shapley", "score x baseline labels", ""),
    ("axioms.exact.integrated_gradients", "score x baseline", "max_pieces"),
    ("axioms.exact.breakpoints", "score x baseline", "max_pieces"),
    ("axioms.exact.slopes", "score x baseline", "max_pieces"),
    ("axioms.exact.variation", "score x baseline", "max_pieces"),
    ("axioms.exact.gradient", "score x", "step"),
    ("models.sliding_window", "model patch overlap weights", "steps"),
    ("models.patchwise", "build patch overlap weights", "steps"),
    ("verify", "method", "axioms cases seconds seed scores database"),
    ("show", "map anatomy spacing kind title affine", "subtitle mask outline box colours"),
    ("baselines.zero", "x", ""),
    ("baselines.black", "x minimum", ""),
    ("baselines.white", "x maximum", ""),
    ("baselines.mean", "x", ""),
    ("baselines.blurred", "x sigma spacing", ""),
    ("baselines.uniform", "x", "key low high"),
    ("baselines.farthest_corner", "x low high", ""),
    ("baselines.dataset", "samples", "key count"),
    ("masks.nearest_region", "mask area", ""),
    ("masks.area_residual", "mask", "area"),
    ("masks.scattered", "key x", "cells keep"),
    ("masks.smooth", "", "step sigma spacing"),
    ("baselines.shuffled", "", "key"),
    ("baselines.defocused", "sigma", "levels spacing"),
    ("baselines.inpainted", "x baseline keep", "spacing steps"),
    ("baselines.continued", "x hidden", "spacing steps"),
    ("baselines.normal", "x", "key centre sigma"),
    ("baselines.constant", "x value", ""),
    ("baselines.another", "samples", "key"),
    ("noise.absolute", "sigma", ""),
    ("noise.fraction_of_range", "fraction", ""),
    ("noise.within", "noise mask", ""),
    ("random.fold_in", "key index", ""),
    ("random.uniform", "key shape", "dtype device"),
    ("random.normal", "key shape", "dtype device"),
    ("spatial.blur", "x sigma spacing", ""),
    ("spatial.dilate", "mask", "faces"),
    ("spatial.erode", "mask", "faces"),
    ("spatial.boundary", "mask", "faces"),
    ("spatial.parts", "mask", ""),
    ("spatial.upsample", "map", "like"),
    ("segmentation.slic", "x count", "spacing compactness iterations mask"),
    ("segmentation.graph_segmentation", "x scale", "spacing sigma minimum"),
    ("segmentation.relabelled", "labels", ""),
    ("segmentation.dilated", "mask radius", "spacing"),
    ("segmentation.ranked", "density segments", "reach least spacing"),
    ("segmentation.averaged", "a labels", ""),
]
MODULES = [eg.axioms, eg.baselines, eg.models, eg.noise, eg.random, eg.reducers, eg.spatial, zoo]
# Decorators, registry functions and building blocks: no formula, no paper, or not called by users.
UNREGISTERED_NEED_NO_EXAMPLE = {"method", "metric", "transform", "reducer", "adaptive_report", "find_method"}


def own(fn):
    return isinstance(fn, types.FunctionType) and fn.__module__.startswith("esegeta.")


def public():
    """Every public function of the package, by the name that users write."""
    found = {n: getattr(eg, n) for n in eg.__all__ if own(getattr(eg, n))}
    for module in MODULES:
        short = module.__name__.removeprefix("esegeta.")
        for name, value in vars(module).items():
            if not name.startswith("_") and own(value) and value.__module__.startswith(module.__name__):
                found[f"{short}.{name}"] = value
    return found


REGISTERED = {
    spec.name: spec
    for table in (METHODS, TRANSFORMS, REDUCERS)
    for spec in table.values()
    if spec.fn.__module__.startswith("esegeta.")
}
PUBLIC = public()


@together(("name", "positional", "keyword"), PROMISED, ids=[p[0] for p in PROMISED])
def test_a_promised_name_has_its_signature(name, positional, keyword):
    fn = eg
    for part in name.split("."):
        fn = getattr(fn, part)
    parameters = inspect.signature(fn).parameters.values()
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert (named, only) == (positional.split(), keyword.split())
    assert len(named) + len(only) == len(list(parameters)), "no *args, no **kwargs"


def test_every_registered_function_is_promised():
    promised = {name for name, _, _ in PROMISED}
    missing = {
        f"reducers.{n}" if n in REDUCERS else n for n in REGISTERED if not {n, f"reducers.{n}"} & promised
    }
    assert not missing, f"enter {missing} in PROMISED"


def test_all_is_what_there_is():
    assert all(hasattr(eg, name) for name in eg.__all__)
    assert len(set(eg.__all__)) == len(eg.__all__)
    unlisted = {n for n, v in vars(eg).items() if not n.startswith("_") and own(v)} - set(eg.__all__)
    assert not unlisted


@together("name", sorted(PUBLIC))
def test_a_public_function_is_documented_and_annotated(name):
    fn = PUBLIC[name]
    doc = inspect.getdoc(fn) or ""
    assert doc, "no docstring"
    first = doc.split("\n\n")[0]
    assert first.rstrip("`").endswith((".", "?")), f"the first line is a sentence: {first}"
    inner = inspect.unwrap(fn)
    signature = inspect.signature(inner)
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    assert not bare, f"no annotation: {bare}"
    assert signature.return_annotation is not signature.empty or name == "adaptive_report"
    assert ">>> " in doc or name in UNREGISTERED_NEED_NO_EXAMPLE


@together("name", sorted(REGISTERED))
def test_a_registered_function_has_every_section(name):
    spec = REGISTERED[name]
    doc = inspect.getdoc(spec.fn) or ""
    wanted = ["Args:", "Returns:", "Example:", ">>> "]
    if name not in REDUCERS:  # most reducers are nobody's invention
        wanted.append("Reference:")
    assert [w for w in wanted if w not in doc] == []
    assert [doc.index(w) for w in wanted if w != ">>> "] == sorted(
        doc.index(w) for w in wanted if w != ">>> "
    )
    assert ".. math::" in doc or ":math:" in doc
    arguments = list(inspect.signature(inspect.unwrap(spec.fn)).parameters.values())
    section = doc[doc.index("Args:") : doc.index("Returns:")]
    assert [a.name for a in arguments if f"    {a.name}: " not in section] == []
    assert sum(a.kind is a.KEYWORD_ONLY for a in arguments) <= 6


def test_other_names_lead_to_one_method_each():
    names = [n for s in METHODS.values() for n in (s.name, *s.also)]
    assert len(set(names)) == len(names)
    for spec in METHODS.values():
        for other in spec.also:
            assert eg.find_method(other) is spec


def test_claimed_axioms_exist():
    for spec in METHODS.values():
        assert all(callable(getattr(eg.axioms, a, None)) for a in spec.axioms), spec.name
    for spec in TRANSFORMS.values():
        assert all(callable(getattr(eg.axioms, a, None)) for a in spec.preserves), spec.name
