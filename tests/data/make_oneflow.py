"""Makes oneflow.tar.xz with a network built by flowvision's own code.

    python3.10 -m venv VENV && VENV/bin/pip install oneflow==0.9.0 flowvision 'numpy<1.24'
    VENV/bin/pip install 'nvidia-cudnn-cu11<9' nvidia-cublas-cu11
    LD_LIBRARY_PATH=$(echo VENV/lib/python3.10/site-packages/nvidia/*/lib | tr ' ' :)
    LD_LIBRARY_PATH=$LD_LIBRARY_PATH VENV/bin/python tests/data/make_oneflow.py

The archive has one network in OneFlow's three checkpoint formats. legacy.zip is a folder with one folder per tensor, as
OneFlow wrote before 0.6; folder.zip is the folder that 0.6 to 0.9 write. Both are zipped, as flowvision publishes its
weights. single.pkl is the file that OneFlow writes since 1.0.
"""

import pickle
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import oneflow as flow
from oneflow.framework.check_point_v2 import _save_tensor_to_disk
from reference import bare, pack, random_value, save_reference


def zip_folder(folder: Path) -> None:
    """Replaces a folder with an uncompressed zip file: unlike real weights, these would shrink a lot."""
    with zipfile.ZipFile(f'{folder}.zip', 'w') as archive:
        for path in [folder, *sorted(folder.rglob('*'))]:
            archive.write(path, path.relative_to(folder.parent))
    shutil.rmtree(folder)


def main() -> None:
    bare('flowvision')  # its detectors don't import
    bare('flowvision.models')
    from flowvision.models.res2net import Bottle2neck, Res2Net

    rng = np.random.default_rng(0)
    model = Res2Net(Bottle2neck, [1, 2, 1, 1], baseWidth=2, scale=4, num_classes=5).eval()
    state = model.state_dict()
    for name, tensor in state.items():
        if not name.endswith('num_batches_tracked'):
            norm = f'{name.rpartition(".")[0]}.running_var' in state
            positive = name.endswith('running_var') or (norm and name.endswith('weight'))
            state[name].copy_(flow.tensor(random_value(tuple(tensor.shape), positive, rng)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, tensor in state.items():  # what OneFlow 0.5 does, and later versions still load
            _save_tensor_to_disk(tensor, folder / 'legacy' / name)
        (folder / 'legacy' / 'snapshot_done').touch()
        flow.save(state, folder / 'folder')
        # What OneFlow 1.0 does. Pickled outside of `flow.save`, 0.9 gives its tensors the same state.
        data = pickle.dumps({'protocol_version': 1, '__oneflow__': None, 'data': state})
        (folder / 'single.pkl').write_bytes(data)
        for loaded in (flow.load(folder / 'legacy'), flow.load(folder / 'folder'), pickle.loads(data)['data']):
            assert loaded.keys() == state.keys()
            assert all(np.array_equal(loaded[name].numpy(), state[name].numpy()) for name in state)
        zip_folder(folder / 'legacy')
        zip_folder(folder / 'folder')
        save_reference(lambda x: model(flow.tensor(x)).numpy(), folder / 'single', rng)
        for name in ('legacy', 'folder'):
            shutil.copy(folder / 'single.npz', folder / f'{name}.npz')
        pack(temporary, 'oneflow.tar.xz')


if __name__ == '__main__':
    main()
