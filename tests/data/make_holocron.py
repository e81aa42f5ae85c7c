"""Makes holocron.tar.xz with networks built by Holocron's own code.

    python -m venv VENV && VENV/bin/pip install pylocron
    VENV/bin/python tests/data/make_holocron.py

One network is like the published one; the other has a deep stem, and average pools in its shortcuts.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from holocron.models.classification.res2net import _res2net
from reference import pack, randomize_state, save_reference

PLANES = [16, 32, 64, 128]


def main() -> None:
    deep = dict(deep_stem=True, avg_downsample=True)
    made = {
        'plain': _res2net(None, False, [1, 2, 1, 1], PLANES, 16, 4, num_classes=5),
        'deep_stem': _res2net(None, False, [1, 2, 1, 1], PLANES, 20, 3, num_classes=5, **deep),
    }
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for seed, (name, model) in enumerate(made.items()):
            rng = np.random.default_rng(seed)
            randomize_state(model, rng)
            torch.save(model.state_dict(), Path(folder, f'{name}.pth'))
            save_reference(lambda x, model=model: model.eval()(torch.from_numpy(x)).numpy(), Path(folder, name), rng)
        pack(folder, 'holocron.tar.xz')


if __name__ == '__main__':
    main()
