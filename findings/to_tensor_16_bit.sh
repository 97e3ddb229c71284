#!/usr/bin/env bash
# torchvision 0.29.1, torch 2.14.1: `transforms.ToTensor` of an image with 16 bits per pixel (mode I;16, as Pillow opens a grey PNG
# of 16 bits) gives int16 without scaling, without a message: bright pixels become negative. `transforms.v2` reads
# uint16 and scales. Normalize refuses the result, other transforms and models that cast it to floats do not.
# Expected: numbers from 0 to 1, as from an image of 8 bits, or an error.
# Seen:
#   pixels 0, 30000, 60000: ToTensor torch.int16 [0, 30000, -5536], v2 torch.float32 [0.0, 0.458, 0.916]
. "$(dirname "$0")/common.sh"
install torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 pillow==13.0.0
cat > check.py <<'PY'
import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

Image.fromarray(np.array([[0, 30000, 60000]], dtype=np.uint16)).save("grey.png")
image = Image.open("grey.png")
old = transforms.ToTensor()(image)
new = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])(image)
rounded = [round(number, 3) for number in new.flatten().tolist()]
print(f"pixels 0, 30000, 60000: ToTensor {old.dtype} {old.flatten().tolist()}, v2 {new.dtype} {rounded}")
assert image.mode == "I;16" and old.flatten().tolist() == [0, 30000, -5536], "changed"
assert rounded == [0, 0.458, 0.916], "changed"
PY
"$python" check.py
