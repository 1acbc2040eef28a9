"""Who multiplies: on a CPU oneDNN in place of MKL, where it loses no digit; on a GPU not cuDNN.

PyTorch hands bf16 products to oneDNN and float32 ones to MKL, which takes about twice as long on
the AMD processor of docs/speed.md. The one setting that gives oneDNN the float32 ones as well is
"bf16". It permits bf16 inside: a processor with AMX takes that, others multiply in float32. So what
it does is looked at, never guessed from a processor's name.
"""

import torch

FLOAT32 = 1e-5  # relative error: float32's is below 1e-6, bf16's above 1e-3, TF32's above 1e-4


def avoid_cudnn_attention():
    """Leave attention on a GPU to PyTorch's own kernels from now on; without effect elsewhere.

    On a Hopper GPU PyTorch 2.11 to 2.13 prefer cuDNN's in bf16, whose backward pass gives NaN for
    masked rows of some lengths (pytorch/pytorch#196678): every run that meets one diverges.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def use_onednn():
    """Let oneDNN multiply from now on if it does so in float32 -> whether it does.

    Of this process; it changes results by rounding alone, and equally in every run on a machine.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    if not products_are_float32():
        matmul.fp32_precision = before
        return False
    return True


def products_are_float32():
    """Whether the products of a layer's forward and backward pass keep float32's digits."""
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 16, 256):  # a decoded token, a batch of them, a training step
        x, W, g = (torch.randn(shape, generator=generator)
                   for shape in ((tokens, 192), (320, 192), (tokens, 320)))
        for left, right in ((x, W.T), (g, W), (g.T, x)):
            for several in (False, True):  # attention multiplies batches of matrices
                pair = [each.expand(2, *each.shape) if several else each for each in (left, right)]
                exact = pair[0].double() @ pair[1].double()
                if ((pair[0] @ pair[1]).double() - exact).norm() > FLOAT32 * exact.norm():
                    return False
    return True
