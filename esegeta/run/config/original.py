"""The methods of the original system, TorchEsegeta: what each entry of its configuration becomes here."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

Table = dict[str, Any]


class Old(NamedTuple):
    """An entry of the original: its keywords, and whether it is about volumes."""

    keywords: Table
    volumes: bool

    def place(self, key: str = "layer") -> str:
        """Return the name of a layer: ``Conv1.conv[0]`` is ``Conv1.conv.0`` here."""
        name = re.sub(r"\[(\d+)\]", r".\1", str(self.keywords.get(key, "")))
        return f"{name}:in" if self.keywords.get("attribute_to_layer_input") else name


class New(NamedTuple):
    """What an entry becomes, and what is otherwise than it was."""

    fields: Table
    notes: tuple[str, ...] = ()


Rule = Callable[[Old], New]


def _plain(name: str, *notes: str) -> Rule:
    return lambda _: New({"name": name}, notes)


def _at(name: str, *notes: str, **fields: Any) -> Rule:
    return lambda old: New({"name": name, "place": old.place(), **fields}, notes)


def _from(name: str, *notes: str, **parameters: Any) -> Rule:
    """A method with a baseline, which was zero everywhere."""
    settings: Table = {"parameters": parameters} if parameters else {}
    return lambda _: New({"name": name, "baseline": "zero", **settings}, notes)


def _saliency(old: Old) -> New:
    return New({"name": "saliency" if old.keywords.get("abs", True) else "gradient"})


def _occlusion(old: Old) -> New:
    window = [int(n) for n in str(old.keywords.get("sliding_window_shapes", "1,11,11")).split(",")]
    fields = {
        "name": "occlusion",
        "baseline": "zero",
        "parameters": {"size": window[1:], "stride": old.keywords.get("strides", 3)},
    }
    return New(fields, (f"a window of {window[0]} channels was written; here windows cover all channels",))


def _shifted_at(name: str, **fields: Any) -> Rule:
    note = (
        "the path is straight between the activations of the layer, with everything beside it as at the image; "
        "in the original it was straight in the image"
    )
    return lambda old: New({"name": name, "place": old.place(), "baseline": "zero", **fields}, (note,))


def _contrast(old: Old) -> New:
    return New(
        {
            "name": "contrastive_excitation_backprop",
            "place": old.place("contrast_layer"),
            "parameters": {"contrast": old.place()},
        },
        (
            "the map is at contrast_layer, and layer is where the excitations are compared",
            "classifier_layer is not needed: the score says where the walk begins",
        ),
    )


def _gradient_shap(old: Old) -> New:
    noise = float(old.keywords.get("stdiv", 0.0))
    parameters: Table = {"samples": old.keywords.get("n_samples", 5)}
    if noise:
        parameters["noise"] = {"name": "absolute", "sigma": noise}
    note = "its baselines were made in the code, here the one is zero: name more of them in baseline"
    return New({"name": "gradient_shap", "baseline": ["zero"], "parameters": parameters}, (note,))


def _guided_activation(old: Old) -> New:
    parameters = {"unit": old.keywords.get("filter_pos", 0)}
    return New({"name": "layer_activation_guided_backprop", "place": old.place(), "parameters": parameters})


def _lime(old: Old) -> New:
    words = old.keywords
    notes = ["segments are supervoxels; num_features and top_labels only chose what was drawn"]
    if old.volumes:
        notes.append(
            "the original went slice by slice and kept each slice changed; here parts are of the volume"
        )
    samples = words.get("num_samples", 1000)
    if samples < 100:
        notes.append(f"{samples} samples were said; as many as parts are needed at least, so it is 200")
    parameters = {"features": {"name": "supervoxels", "count": 50}, "samples": max(samples, 200)}
    return New({"name": "lime", "baseline": "zero", "parameters": parameters}, tuple(notes))


_MODULES = "firstLayer is not needed"
_SUM = "neuron_start and neuron_end chose channels to draw; here the map is the sum over the channels"
RULES: dict[str, Rule] = {
    "captum_Saliency": _saliency,
    "captum_Feature_Ablation": _from(
        "feature_ablation",
        "every voxel by itself, as it was, takes as many runs as there are voxels: "
        'parameters = {features = {name = "grid", size = 8}} takes few',
    ),
    "captum_Integrated_Gradients": _from(
        "integrated_gradients", "50 steps, as was Captum's default", steps=50
    ),
    "captum_occlusion": _occlusion,
    "captum_guided_backprop": _plain("guided_backprop"),
    "captum_deep_lift": _from("deep_lift"),
    "captum_deconvolution": _plain("deconvolution"),
    "captum_guided_grad_cam": _at("guided_grad_cam"),
    "captum_layer_activaltion": _at("layer_activation", _SUM),
    "cnn_vis_guided_backprop": _plain("guided_backprop", _MODULES),
    "cnn_vis_integrated_grad": lambda old: New(
        {
            "name": "integrated_gradients",
            "baseline": "zero",
            "parameters": {"steps": old.keywords.get("n_samples", 50)},
        },
        ("it lacked the factor (x - baseline), which is in here", _MODULES),
    ),
    "cnn_vis_guided_grad_cam": _at("guided_grad_cam", _MODULES),
    "cnn_vis_score_cam": _at("score_cam", baseline="zero"),
    "captum_layer_conductance": _at(
        "conductance", "one step was fixed in the code; here there are 64", baseline="zero"
    ),
    "cnn_vis_vanilla_backprop": _plain("gradient", _MODULES),
    "cnn_vis_grad_cam": _at("grad_cam"),
    "cnn_vis_grad_times_image": _plain("input_x_gradient", _MODULES),
    "captum_layer_grad_shap": _shifted_at("gradient_shap", parameters={"samples": 5}),
    "torchray_excitation_backprop": _at("excitation_backprop"),
    "torchray_contrast_excitation_backprop": _contrast,
    "captum_gradient_shap": _gradient_shap,
    "captum_internal_influence": _at("internal_influence", baseline="zero", parameters={"steps": 50}),
    "captum_input_x_gradient": _plain("input_x_gradient"),
    "captum_deep_lift_shap": lambda _: New(
        {"name": "deep_lift_shap", "baseline": ["zero"]},
        ("its baselines were made in the code, here the one is zero: name more of them in baseline",),
    ),
    "captum_LayerGradientXActivation": _at("layer_gradient_x_activation"),
    "captum_LayerDeepLift": _shifted_at("deep_lift"),
    "captum_LayerGradCam": _at("grad_cam", "Captum's has no ReLU, and neither has this one"),
    "torchray_Deconv": _plain("deconvolution"),
    "torchray_Gradcam": _at("grad_cam"),
    "torchray_Gradient": _plain(
        "gradient",
        "TorchRay drew the largest size over the channels: "
        'transforms = [{name = "reduce_channels", by = "max_abs"}]',
    ),
    "torchray_Guidedbackprop": _plain("guided_backprop"),
    "torchray_Linearapprox": _at("hires_cam", "called linear approximation there"),
    "torchray_Rise": lambda _: New({"name": "rise", "baseline": "zero"}, ("it was for pictures only",)),
    "cnn_vis_layer_activation_guided_backprop": _guided_activation,
    "captum_ShapleyValueSampling": lambda old: New(
        {
            "name": "shapley_sampling",
            "baseline": "zero",
            "parameters": {
                "samples": old.keywords.get("n_samples", 25),
                "features": {"name": "supervoxels", "count": 50},
            },
        },
        ("of 50 supervoxels; of every voxel by itself, as it was, it would not end",),
    ),
    "lime_segmentation": _lime,
}
SMOOTHED = {"smoothgrad": "smooth", "smoothgrad_sq": "smooth_squared", "vargrad": "variance"}


# --- Dreams: images that a filter answers to


def _grey(low: float, high: float) -> Table:
    """Return mean and deviation of uniform grey values, as the network was given them: ImageNet's red, always."""
    scale = 255 * 0.229
    return {
        "start": "noise",
        "mean": round(((low + high) / 2 - 255 * 0.485) / scale, 4),
        "sigma": round((high - low) / 12**0.5 / scale, 4),
    }


def _of_channel(place: str, channel: object) -> Table:
    return {"name": "channel", "place": place, "channel": int(str(channel))}


_SKIPPED = "it ran the children of the network one by one, past its skip connections; here the network is run"
_NOISE = "noise is normal, with mean and deviation of the uniform one"


def _layer_visualisation(old: Old) -> New:
    fields = {
        "objective": _of_channel(old.place(), old.keywords.get("filter_pos", 0)),
        "recipe": "layer_visualisation",
        "parameters": {"steps": old.keywords.get("update_count", 30)},
        **_grey(150, 180),
    }
    return New(fields, (_NOISE,))


def _deep_dream(old: Old) -> New:
    words = old.keywords
    fields = {
        "objective": _of_channel(old.place(), words.get("filter_pos", 0)),
        "recipe": "deep_dream",
        "parameters": {"steps": words.get("update_count", 250), "rate": 12.0},
        **_grey(words.get("init_color_low", 150), words.get("init_color_high", 180)),
    }
    notes = ["shape is that of the first image"] if "shape" in words else []
    return New(fields, (_NOISE, _SKIPPED, *notes, "a rate of 12 fits the scale of one network: try others"))


def _lucent(old: Old) -> New:
    """Lucent joins the names of modules by underscores, and says the channel after a colon."""
    layer, _, channel = str(old.keywords.get("layer", "")).partition(":")
    fields = {
        "objective": _of_channel(re.sub("_+", ".", layer), channel),
        "recipe": "render",
        "parameters": {"steps": 512, "bounds": [0.0, 1.0], **({"pad": 0} if old.volumes else {})},
        "start": "noise",
        "mean": 0.5,
        "sigma": 0.01,
    }
    notes = [
        f"every underscore of {layer} is a dot: an underscore of your own has to be put back",
        "intensities from 0 to 1, as there: bounds and mean have to be those of your images",
    ]
    if "shape" in old.keywords:
        notes.append("shape is that of the first image")
    if old.volumes:
        notes.append("depth was taken for channels there, without frame and distortions; here it is an axis")
    return New(fields, tuple(notes))


DREAMS: dict[str, Rule] = {
    "lucent_render_vis": _lucent,
    "cnn_vis_layer_visualization": _layer_visualisation,
    "cnn_vis_DeepDream": _deep_dream,
}
