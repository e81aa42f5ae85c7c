"""Makes mindspore.tar.xz with networks built by MindCV's own code.

    python -m venv VENV && VENV/bin/pip install mindspore mindcv
    VENV/bin/python tests/data/make_mindspore.py

One network has a plain stem and shortcuts; the other is v1b.
"""

import tempfile
from pathlib import Path

import mindspore
import numpy as np
from mindcv.models.res2net import Bottle2neck, Res2Net
from reference import pack, random_value, save_reference


def main() -> None:
    made = {
        'res2net': dict(version='res2net', base_width=2, scale=4),
        'res2net_v1b': dict(version='res2net_v1b', base_width=3, scale=3),
    }
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, args) in enumerate(made.items()):
            rng = np.random.default_rng(seed)
            net = Res2Net(Bottle2neck, [1, 2, 1, 1], num_classes=5, **args)
            for parameter in net.get_parameters():
                positive = parameter.name.endswith(('moving_variance', 'gamma'))
                parameter.set_data(mindspore.Tensor(random_value(parameter.shape, positive, rng)))
            net.set_train(False)
            mindspore.save_checkpoint(net, str(Path(folder, f'{name}.ckpt')))
            save_reference(lambda x, net=net: net(mindspore.Tensor(x)).asnumpy(), Path(folder, name), rng)
        pack(folder, 'mindspore.tar.xz')


if __name__ == '__main__':
    main()
