"""A segmentation graph for Isaac ROS: image encoder, TensorRT node and U-Net decoder.

Written against the sources of ``isaac_ros_unet`` (``isaac_ros_unet_encoder.launch.py``: resized, divided by 255, normalized,
planar; ``segmentation_postprocessor``: ``argmax`` copies int32 or int64 ``(1, H, W, 1)`` to a mask of 8 bits;
``segmentation_mask_colorizer``: ``0xRRGGBB`` by class) and ``isaac_ros_tensor_rt`` (a plan is loaded when it is there and not
forced to be built; it builds none of FP16 or INT8 itself).
"""

from __future__ import annotations

import json

from edgeseg.handover.contents import Content, graph_bytes, label_lines, readme, require, threshold_words
from edgeseg.handover.face import Face, with_face
from edgeseg.runtime.overlay import spec_palette
from edgeseg.spec import PipelineSpec
from edgeseg.store.engine import Engine

LAUNCH_NAME = "edgeseg.launch.py"
PARAMETERS_NAME = "parameters.json"
PLAN_NAME = "model.plan"
FACE = Face("input_tensor", "output_tensor", "classes", scale=1 / 255)


def contents(engine: Engine) -> dict[str, Content]:
    """The files of the folder, by path.

    Raises:
        SpecError: Isaac ROS cannot run the engine.
        BuildError: the graph made does not give the engine's masks.
    """
    require(engine, "Isaac ROS", target="tensorrt", fit="resize", batch=False, channels=(3,))
    spec = engine.manifest.spec
    size = spec.input
    made = with_face(engine, FACE)
    start = f"""Start it, in this folder, where Isaac ROS is installed (packages isaac_ros_unet, isaac_ros_tensor_rt);
the plan is built once, of the graph's own types, which the node itself would not keep:

    trtexec --onnx=model.onnx --saveEngine={PLAN_NAME} --stronglyTyped
    ros2 launch ./{LAUNCH_NAME}"""
    notes = (
        f"Images come on `/image` with `/camera_info`, and are resized to {size.height}x{size.width}, aspect ratio not kept, as "
        "the engine was built for.",
        "Masks come on `/unet/raw_segmentation_mask` (mono8, class indices) and `/unet/colored_segmentation_mask`. "
        + threshold_words(engine),
        f"The parameters of the nodes are in `{PARAMETERS_NAME}`; colours are those of `edgeseg run --overlay`.",
    )
    return {
        "model.onnx": graph_bytes(made),
        LAUNCH_NAME: _LAUNCH.encode(),
        PARAMETERS_NAME: (json.dumps(_parameters(spec), indent=2) + "\n").encode(),
        "labels.txt": label_lines(spec),
        "README.md": readme(engine, "Isaac ROS", start, notes),
    }


def _parameters(spec: PipelineSpec) -> dict[str, object]:
    """By node; files are relative to the folder."""
    size = spec.input
    width, height = str(size.width), str(size.height)
    return {
        # Arguments of a launch file are text.
        "encoder": {
            "input_image_width": width,
            "input_image_height": height,
            "network_image_width": width,
            "network_image_height": height,
            "image_mean": "[0.0, 0.0, 0.0]",
            "image_stddev": "[1.0, 1.0, 1.0]",
            "enable_padding": "True",
            "keep_aspect_ratio": "False",
            "use_planar_input": "True",
            "encoding_desired": "rgb8",
            "final_tensor_name": FACE.input,
        },
        "tensor_rt": {
            "model_file_path": "model.onnx",
            "engine_file_path": PLAN_NAME,
            "force_engine_update": False,
            "input_tensor_names": [FACE.input],
            "input_binding_names": [FACE.input],
            "input_tensor_formats": ["nitros_tensor_list_nchw_rgb_f32"],
            "output_tensor_names": [FACE.output],
            "output_binding_names": [FACE.output],
            "output_tensor_formats": ["nitros_tensor_list_nhwc_rgb_f32"],
        },
        "decoder": {
            "network_output_type": "argmax",
            "color_segmentation_mask_encoding": "rgb8",
            "mask_width": size.width,
            "mask_height": size.height,
            "color_palette": [int(red) << 16 | int(green) << 8 | int(blue) for red, green, blue in spec_palette(spec)],
        },
    }


_LAUNCH = f'''"""Image encoder, TensorRT node and U-Net decoder, with the parameters beside this file."""

import json
from pathlib import Path

import launch
from ament_index_python.packages import get_package_share_directory
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch_ros.actions import ComposableNodeContainer
from launch_ros.descriptions import ComposableNode

HERE = Path(__file__).resolve().parent
CONTAINER = "edgeseg_container"


def generate_launch_description():
    """Return the nodes of this folder."""
    parameters = json.loads((HERE / "{PARAMETERS_NAME}").read_text())
    tensor_rt = parameters["tensor_rt"]
    for name in ("model_file_path", "engine_file_path"):
        tensor_rt[name] = str(HERE / tensor_rt[name])
    encoder = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(
            str(Path(get_package_share_directory("isaac_ros_unet")) / "launch" / "isaac_ros_unet_encoder.launch.py")
        ),
        launch_arguments={{
            **parameters["encoder"],
            "image_input_topic": "/image",
            "camera_info_input_topic": "/camera_info",
            "tensor_output_topic": "/tensor_pub",
            "attach_to_shared_component_container": "True",
            "component_container_name": CONTAINER,
        }}.items(),
    )
    nodes = [
        ComposableNode(
            name="tensor_rt_node",
            package="isaac_ros_tensor_rt",
            plugin="nvidia::isaac_ros::dnn_inference::TensorRTNode",
            parameters=[tensor_rt],
        ),
        ComposableNode(
            name="unet_decoder_node",
            package="isaac_ros_unet",
            plugin="nvidia::isaac_ros::unet::UNetDecoderNode",
            parameters=[parameters["decoder"]],
        ),
    ]
    container = ComposableNodeContainer(
        name=CONTAINER,
        namespace="",
        package="rclcpp_components",
        executable="component_container_mt",
        composable_node_descriptions=nodes,
        output="screen",
    )
    return launch.LaunchDescription([container, encoder])
'''
