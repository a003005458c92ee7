import torch
from hypothesis import settings

# tiny tensors: threads only cost, and results stay the same from run to run
torch.set_num_threads(1)
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")
