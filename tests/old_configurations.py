"""The four layouts of the original system's configurations, with the values that it shipped."""

import copy

COMMON = {
    "isDepthFirst": True,
    "batch_dim_present": False,
    "default": True,
    "test_run": "final_test",
    "resize": 120,
    "centre_crop": 120,
    "mean_vec": [0.485, 0.456, 0.406],
    "std_vec": [0.229, 0.224, 0.225],
    "log_level": "INFO",
    "output_path": "/somewhere/results",
    "amp_enbled": True,
    "share_gpu_threads": 2,
}
HEADERS = {
    "Seg_3d": {
        "model_nature": "Segmentation",
        "model_name": "Vessel_seg_UNET",
        "is_3d": True,
        "dataset": "IXI_MRA",
        "patch_size": 64,
        "patch_overlap": 12,
        "timeout_enabled": False,
        "timeout_time": 3600,
    },
    "Seg_2d": {
        "model_nature": "Segmentation",
        "model_name": "customResnet2D",
        "is_3d": False,
        "dataset": "coco_sample",
        "patch_size": -1,
        "patch_overlap": 0,
        "timeout_enabled": True,
        "timeout_time": 1800,
    },
    "class_3d": {
        "model_nature": "Classification",
        "model_name": "FARAZ_Model_3dresnet",
        "is_3d": True,
        "dataset": "FARAZ_IXI",
        "patch_size": -1,
        "patch_overlap": 6,
        "timeout_enabled": True,
        "timeout_time": 1800,
    },
    "Class_2d": {
        "model_nature": "Classification",
        "model_name": "covidClssifier",
        "is_3d": False,
        "batch_dim_present": True,
        "default": False,
        "dataset": "Covid_xray",
        "patch_size": -1,
        "patch_overlap": 0,
        "timeout_enabled": True,
        "timeout_time": 3600,
    },
}
NOISE = {"nt_type": "smoothgrad"}
FIRST = {"firstLayer": "Conv1.conv[0]"}
METHODS = {
    "captum_Saliency": {"abs": False, **NOISE, "n_samples": 10},
    "captum_Feature_Ablation": {"perturbations_per_eval": 2, **NOISE, "n_samples": 2},
    "captum_Integrated_Gradients": {**NOISE, "n_samples": 2},
    "captum_occlusion": {"sliding_window_shapes": "1,11,11,11", "strides": 3, **NOISE, "n_samples": 2},
    "captum_guided_backprop": {**NOISE, "n_samples": 10},
    "captum_deep_lift": {**NOISE, "n_samples": 2},
    "captum_deconvolution": {**NOISE, "n_samples": 5},
    "captum_guided_grad_cam": {"layer": "Conv5", **NOISE, "n_samples": 5},
    "captum_layer_activaltion": {"layer": "Conv5", "neuron_start": 0, "neuron_end": 5},
    "cnn_vis_guided_backprop": FIRST,
    "cnn_vis_integrated_grad": {"n_samples": 2, **FIRST},
    "cnn_vis_guided_grad_cam": {"layer": "Conv5.conv[0]", **FIRST},
    "cnn_vis_score_cam": {"layer": "Conv5.conv[0]"},
    "captum_layer_conductance": {"layer": "Conv2", "device_ids": [5, 6]},
    "cnn_vis_vanilla_backprop": FIRST,
    "cnn_vis_grad_cam": {"layer": "Conv5.conv[0]"},
    "cnn_vis_grad_times_image": FIRST,
    "captum_layer_grad_shap": {"layer": "Conv1", "attribute_to_layer_input": True},
    "torchray_excitation_backprop": {"layer": "Conv2"},
    "torchray_contrast_excitation_backprop": {
        "layer": "Conv5",
        "contrast_layer": "Conv1",
        "classifier_layer": "Conv",
    },
    "captum_gradient_shap": {"n_samples": 5, "stdiv": 1.0},
    "captum_internal_influence": {"layer": "Conv2", "device_ids": [6, 5, 4, 3]},
    "captum_input_x_gradient": {},
    "captum_deep_lift_shap": {},
    "lucent_render_vis": {"layer": "Conv3_conv:0", "shape": [64, 64, 64]},
    "captum_LayerGradientXActivation": {"layer": "Conv1.conv[0]"},
    "captum_LayerDeepLift": {"layer": "Conv5.conv[0]", "attribute_to_layer_input": True},
    "captum_LayerGradCam": {"layer": "Conv1"},
    "torchray_Deconv": {},
    "torchray_Gradcam": {"layer": "Conv2.conv[0]"},
    "torchray_Gradient": {},
    "torchray_Guidedbackprop": {},
    "torchray_Linearapprox": {"layer": "Conv2"},
    "cnn_vis_layer_activation_guided_backprop": {"layer": "Conv", "filter_pos": 0, **FIRST},
    "cnn_vis_layer_visualization": {"layer": "Conv5.conv[0]", "filter_pos": 5},
    "cnn_vis_DeepDream": {
        "layer": "Conv5.conv",
        "filter_pos": 5,
        "init_color_low": 180,
        "init_color_high": 200,
        "shape": [1, 1, 32, 128, 128],
    },
    "captum_ShapleyValueSampling": {"n_samples": 10},
}
LIME = {
    "Seg_3d": {"top_labels": 5, "num_samples": 5, "num_features": 5, "depth": 32},
    "Seg_2d": {"top_labels": 6, "num_samples": 1000, "num_features": 5},
    "class_3d": {"top_labels": 10, "num_samples": 1, "num_features": 5, "depth": 32},
    "Class_2d": {"top_labels": 10, "num_samples": 100, "num_features": 5},
}
NOT_PATCHED = (
    "layer_",
    "excitation",
    "Layer",
    "torchray",
    "Dream",
    "lucent",
    "Ablation",
    "occlusion",
    "Shapley",
)


def old(layout):
    """A configuration of the original, as its file has it."""
    volumes = HEADERS[layout]["is_3d"]
    methods = []
    for name, keywords in METHODS.items():
        words = {**copy.deepcopy(keywords), "affine_size": 4}
        if not volumes and "sliding_window_shapes" in words:
            words["sliding_window_shapes"] = "3,11,11"
        if not volumes and "stdiv" in words:
            words["stdiv"] = 0.0
        methods.append(
            {
                "method_name": name,
                "library": name.partition("_")[0],
                "inpt_transform_req": False,
                "visualize_method": "heat_map",
                "sign": "positive",
                "show_colorbar": True,
                "title": f"Title of {name}",
                "device_id": "cuda:6",
                "share_gpu": not volumes,
                "patch_required": volumes and not any(word in name for word in NOT_PATCHED),
                "use": False,
                "uncertainity_metrics": False,
                "uncertainity_cascading": 0,
                "keywords": words,
            }
        )
    lime = {
        "method_name": "lime_segmentation",
        "library": "lime",
        "device_id": "cuda:6",
        "use": layout == "Class_2d",
    }
    explain = [{**lime, "inpt_transform_req": False, "keywords": LIME[layout]}]
    return {**COMMON, **HEADERS[layout], "methods": methods, "explain_methods": explain}
