# Written by: python -m esegeta._stubs
from esegeta import axioms as axioms
from esegeta import baselines as baselines
from esegeta import concepts as concepts
from esegeta import conformance as conformance
from esegeta import dissection as dissection
from esegeta import dreams as dreams
from esegeta import features as features
from esegeta import masks as masks
from esegeta import methods as methods
from esegeta import metrics as metrics
from esegeta import models as models
from esegeta import noise as noise
from esegeta import plot as plot
from esegeta import radiomics as radiomics
from esegeta import random as random
from esegeta import reducers as reducers
from esegeta import rules as rules
from esegeta import segmentation as segmentation
from esegeta import spatial as spatial
from esegeta import transforms as transforms
from esegeta import uncertainty as uncertainty
from esegeta import zoo as zoo
from esegeta._registry import find_method as find_method
from esegeta._registry import method as method
from esegeta._registry import metric as metric
from esegeta._registry import reducer as reducer
from esegeta._registry import transform as transform
from esegeta.conformance.verify import verify as verify
from esegeta.engine.batching import batched as batched
from esegeta.engine.batching import explained as explained
from esegeta.engine.estimates import with_standard_error as with_standard_error
from esegeta.engine.execution import DeadlineExceeded as DeadlineExceeded
from esegeta.engine.execution import ExecutionWarning as ExecutionWarning
from esegeta.engine.execution import execution as execution
from esegeta.engine.memory import forecast as forecast
from esegeta.lesions import Component as Component
from esegeta.lesions import Components as Components
from esegeta.lesions import components as components
from esegeta.methods.ablation_cam import ablation_cam as ablation_cam
from esegeta.methods.adaptive_integrated_gradients import (
    adaptive_integrated_gradients as adaptive_integrated_gradients,
)
from esegeta.methods.adaptive_integrated_gradients import adaptive_report as adaptive_report
from esegeta.methods.blur_integrated_gradients import blur_integrated_gradients as blur_integrated_gradients
from esegeta.methods.cam import cam as cam
from esegeta.methods.conductance import conductance as conductance
from esegeta.methods.deep_lift import deep_lift as deep_lift
from esegeta.methods.deep_lift_reveal_cancel import deep_lift_reveal_cancel as deep_lift_reveal_cancel
from esegeta.methods.deep_lift_shap import deep_lift_shap as deep_lift_shap
from esegeta.methods.eigen_cam import eigen_cam as eigen_cam
from esegeta.methods.eigen_grad_cam import eigen_grad_cam as eigen_grad_cam
from esegeta.methods.elementwise_grad_cam import elementwise_grad_cam as elementwise_grad_cam
from esegeta.methods.exact_shapley import channel_shapley as channel_shapley
from esegeta.methods.exact_shapley import exact_shapley as exact_shapley
from esegeta.methods.excitation_backprop import (
    contrastive_excitation_backprop as contrastive_excitation_backprop,
)
from esegeta.methods.excitation_backprop import excitation_backprop as excitation_backprop
from esegeta.methods.expected_gradients import expected_gradients as expected_gradients
from esegeta.methods.expected_gradients import gradient_shap as gradient_shap
from esegeta.methods.extremal_perturbation import extremal_perturbation as extremal_perturbation
from esegeta.methods.feature_ablation import feature_ablation as feature_ablation
from esegeta.methods.feature_ablation import gaussian_occlusion as gaussian_occlusion
from esegeta.methods.feature_ablation import occlusion as occlusion
from esegeta.methods.feature_permutation import feature_permutation as feature_permutation
from esegeta.methods.feature_permutation import feature_shuffling as feature_shuffling
from esegeta.methods.fem import fem as fem
from esegeta.methods.full_gradient import FullGradient as FullGradient
from esegeta.methods.full_gradient import full_grad as full_grad
from esegeta.methods.full_gradient import full_gradient as full_gradient
from esegeta.methods.grad_cam import grad_cam as grad_cam
from esegeta.methods.grad_cam_plus_plus import grad_cam_plus_plus as grad_cam_plus_plus
from esegeta.methods.gradient import gradient as gradient
from esegeta.methods.gradient import saliency as saliency
from esegeta.methods.guided_backprop import deconvolution as deconvolution
from esegeta.methods.guided_backprop import guided_backprop as guided_backprop
from esegeta.methods.guided_backprop import guided_grad_cam as guided_grad_cam
from esegeta.methods.guided_backprop import (
    layer_activation_guided_backprop as layer_activation_guided_backprop,
)
from esegeta.methods.guided_integrated_gradients import (
    guided_integrated_gradients as guided_integrated_gradients,
)
from esegeta.methods.hires_cam import hires_cam as hires_cam
from esegeta.methods.hsic import hsic_attribution as hsic_attribution
from esegeta.methods.idgi import idgi as idgi
from esegeta.methods.input_x_gradient import input_x_gradient as input_x_gradient
from esegeta.methods.integrated_gradients import integrated_gradients as integrated_gradients
from esegeta.methods.internal_influence import internal_influence as internal_influence
from esegeta.methods.kernel_shap import kernel_shap as kernel_shap
from esegeta.methods.layer import layer_activation as layer_activation
from esegeta.methods.layer import layer_gradient as layer_gradient
from esegeta.methods.layer import layer_gradient_x_activation as layer_gradient_x_activation
from esegeta.methods.layer_cam import layer_cam as layer_cam
from esegeta.methods.lime import LimeFit as LimeFit
from esegeta.methods.lime import lime as lime
from esegeta.methods.lime import lime_fit as lime_fit
from esegeta.methods.lrp import lrp as lrp
from esegeta.methods.meaningful_perturbation import meaningful_perturbation as meaningful_perturbation
from esegeta.methods.neuron_conductance import neuron_conductance as neuron_conductance
from esegeta.methods.owen import partition_shap as partition_shap
from esegeta.methods.random_cam import random_cam as random_cam
from esegeta.methods.rise import rise as rise
from esegeta.methods.score_cam import score_cam as score_cam
from esegeta.methods.seg_eigen_cam import seg_eigen_cam as seg_eigen_cam
from esegeta.methods.seg_xres_cam import seg_xres_cam as seg_xres_cam
from esegeta.methods.shapley_cam import shapley_cam as shapley_cam
from esegeta.methods.shapley_sampling import shapley_sampling as shapley_sampling
from esegeta.methods.sobol import sobol_attribution as sobol_attribution
from esegeta.methods.xgrad_cam import xgrad_cam as xgrad_cam
from esegeta.methods.xrai import xrai as xrai
from esegeta.metrics.comparing import compare as compare
from esegeta.models import from_module as from_module
from esegeta.models import locality as locality
from esegeta.placing import activation_and_gradient as activation_and_gradient
from esegeta.placing import all_places as all_places
from esegeta.placing import at as at
from esegeta.placing import mark as mark
from esegeta.placing import nudge as nudge
from esegeta.placing import places as places
from esegeta.placing import replace as replace
from esegeta.placing import split as split
from esegeta.placing import tap as tap
from esegeta.plot import show as show
from esegeta.spatial import upsample as upsample
from esegeta.transforms.averaging import over_baselines as over_baselines
from esegeta.transforms.fusion import fuse as fuse
from esegeta.transforms.pointwise import absolute as absolute
from esegeta.transforms.pointwise import negative as negative
from esegeta.transforms.pointwise import positive as positive
from esegeta.transforms.pointwise import reduce_channels as reduce_channels
from esegeta.transforms.regions import regions as regions
from esegeta.transforms.smoothing import smooth as smooth
from esegeta.transforms.smoothing import smooth_squared as smooth_squared
from esegeta.transforms.smoothing import variance as variance
from esegeta.transforms.weights import fusion_grad as fusion_grad
from esegeta.transforms.weights import noise_grad as noise_grad
from esegeta.trees import on_trees as on_trees

__version__: str
__all__ = [
    "Component",
    "Components",
    "DeadlineExceeded",
    "ExecutionWarning",
    "FullGradient",
    "LimeFit",
    "ablation_cam",
    "absolute",
    "activation_and_gradient",
    "adaptive_integrated_gradients",
    "adaptive_report",
    "all_places",
    "at",
    "axioms",
    "baselines",
    "batched",
    "blur_integrated_gradients",
    "cam",
    "channel_shapley",
    "compare",
    "components",
    "concepts",
    "conductance",
    "conformance",
    "contrastive_excitation_backprop",
    "deconvolution",
    "deep_lift",
    "deep_lift_reveal_cancel",
    "deep_lift_shap",
    "dissection",
    "dreams",
    "eigen_cam",
    "eigen_grad_cam",
    "elementwise_grad_cam",
    "exact_shapley",
    "excitation_backprop",
    "execution",
    "expected_gradients",
    "explained",
    "extremal_perturbation",
    "feature_ablation",
    "feature_permutation",
    "feature_shuffling",
    "features",
    "fem",
    "find_method",
    "forecast",
    "from_module",
    "full_grad",
    "full_gradient",
    "fuse",
    "fusion_grad",
    "gaussian_occlusion",
    "grad_cam",
    "grad_cam_plus_plus",
    "gradient",
    "gradient_shap",
    "guided_backprop",
    "guided_grad_cam",
    "guided_integrated_gradients",
    "hires_cam",
    "hsic_attribution",
    "idgi",
    "input_x_gradient",
    "integrated_gradients",
    "internal_influence",
    "kernel_shap",
    "layer_activation",
    "layer_activation_guided_backprop",
    "layer_cam",
    "layer_gradient",
    "layer_gradient_x_activation",
    "lime",
    "lime_fit",
    "locality",
    "lrp",
    "mark",
    "masks",
    "meaningful_perturbation",
    "method",
    "methods",
    "metric",
    "metrics",
    "models",
    "negative",
    "neuron_conductance",
    "noise",
    "noise_grad",
    "nudge",
    "occlusion",
    "on_trees",
    "over_baselines",
    "partition_shap",
    "places",
    "plot",
    "positive",
    "radiomics",
    "random",
    "random_cam",
    "reduce_channels",
    "reducer",
    "reducers",
    "regions",
    "replace",
    "rise",
    "rules",
    "saliency",
    "score_cam",
    "seg_eigen_cam",
    "seg_xres_cam",
    "segmentation",
    "shapley_cam",
    "shapley_sampling",
    "show",
    "smooth",
    "smooth_squared",
    "sobol_attribution",
    "spatial",
    "split",
    "tap",
    "transform",
    "transforms",
    "uncertainty",
    "upsample",
    "variance",
    "verify",
    "with_standard_error",
    "xgrad_cam",
    "xrai",
    "zoo",
]
