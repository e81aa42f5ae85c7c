"""Every example in a README runs, every number in it matches the package, and every relative link works."""

import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import eight_bits
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from support import ROOT, shallow, strides, tiny
from torch import Tensor

import timm_res2net
from timm_res2net.__main__ import COMMANDS, make_parser
from timm_res2net.deploy.backend_onnx import OPSET, OPSETS
from timm_res2net.deploy.backends import BACKENDS
from timm_res2net.models.spec import NetworkSpec
from timm_res2net.models.variants import ARCHS, ASSETS, WEIGHTS
from timm_res2net.recipes.detect import create_backbone, create_detector
from timm_res2net.weights.checkpoints import read_checkpoint
from timm_res2net.weights.projects import PROJECTS

PACKAGE = ROOT / 'timm_res2net'
PYPROJECT = (ROOT / 'pyproject.toml').read_text()
READMES = {
    path.parent.name if path.parent != ROOT else 'top': path
    for path in (ROOT / 'README.md', ROOT / 'hub_cards' / 'README.md', *sorted(PACKAGE.rglob('README.md')))
}
TEXTS = {name: path.read_text() for name, path in READMES.items()}
EXAMPLES = {name: re.findall(r'```python\n(.*?)```', text, re.DOTALL) for name, text in TEXTS.items()}


def run(readme: str, part: str, **replacements: str) -> dict[str, Any]:
    """Runs the example of a README that contains `part`, on small images, without downloads; returns its variables."""
    (code,) = (each for each in EXAMPLES[readme] if part in each)
    code = re.sub(r"('res2net\w+'), pretrained=True", r'\1', code).replace('224, 224', '64, 64')
    code = code.replace('num_classes=91', 'num_classes=91, min_size=64')
    for old, new in replacements.items():
        assert old in code
        code = code.replace(old, new)
    variables: dict[str, Any] = {}
    exec(code, variables)
    return variables


def test_readme_top_level_has_at_most_120_lines_and_links_every_other_readme() -> None:
    assert len(TEXTS['top'].splitlines()) <= 120
    targets = {(ROOT / target).resolve() for target in re.findall(r'\]\(([^)]*)\)', TEXTS['top'])}
    assert set(READMES.values()) - targets == {ROOT / 'README.md'}


@pytest.mark.parametrize('readme', READMES)
def test_readme_relative_links_point_to_existing_files(readme: str) -> None:
    targets = re.findall(r'\]\(([^)\s]*)\)', TEXTS[readme])
    relative = [target for target in targets if not re.match(r'https?:', target)]
    assert relative or readme == 'top'
    assert [target for target in relative if not (READMES[readme].parent / target).exists()] == []


@pytest.mark.parametrize('readme', READMES)
def test_readme_commands_and_options_exist(readme: str) -> None:
    text = TEXTS[readme].replace('\\\n', ' ')
    commands: Any = next(action for action in make_parser()._actions if action.dest == 'command')
    for name, arguments in re.findall(r'timm-res2net (\w+)([^\n`&#]*)', text):
        known = commands.choices[name]._option_string_actions
        assert set(re.findall(r'--[a-z][a-z-]*', arguments)) <= set(known), name
    for module in re.findall(r'python -m (timm_res2net[\w.]*)', text):
        assert importlib.util.find_spec(module), module
    for recipe in re.findall(r'--config (timm_res2net\S+)', text):
        assert (ROOT / recipe).is_file(), recipe


@pytest.mark.parametrize('recipe', ['multi_scale', 'detect', 'segment'])
def test_readme_options_of_recipes_exist(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match='0'):
        importlib.import_module(f'timm_res2net.recipes.{recipe}').main(['--help'])
    known = set(re.findall(r'--[\w-]+', capsys.readouterr().out))
    commands = re.findall(rf'-m timm_res2net\.recipes\.{recipe}((?:.*\\\n)*.*)', TEXTS['recipes'])
    assert commands
    for command in commands:
        assert set(re.findall(r'--[\w-]+', command)) <= known


def test_readme_top_level_lists_every_command() -> None:
    assert {*COMMANDS} == {*re.findall(r'^timm-res2net (\w+)', TEXTS['top'], re.MULTILINE)}


@pytest.fixture(scope='module')
def example_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes the files that examples read, made from small networks."""
    folder = tmp_path_factory.mktemp('examples')
    state = timm.create_model('test_res2net', num_classes=0).state_dict()
    torch.save({f'resnet.{name}': tensor for name, tensor in state.items()}, folder / 'deeplab.pth')
    detector = {re.sub('^conv1', 'stem', re.sub('^bn1', 'stem.7', name)): tensor for name, tensor in state.items()}
    detector = {f'backbone.{name}': tensor for name, tensor in detector.items()}
    torch.save({'state_dict': detector}, folder / 'faster_rcnn_r2_101_fpn.pth')
    torch.save({'state_dict': timm.create_model('test_res2net', num_classes=3).state_dict()}, folder / 'last.pth.tar')
    settings = dict(backbone='test_res2net', model_kwargs={}, channels=64, detector_kwargs={'min_size': 64})
    run = folder / 'runs' / 'detect'
    run.mkdir(parents=True)
    (run / 'run.json').write_text(json.dumps({**settings, 'names': ['a', 'b']}))
    save_file(create_detector(create_backbone('test_res2net'), 2, 64).state_dict(), run / 'model.safetensors')
    return folder


@pytest.fixture
def workplace(example_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes to the folder of the example files, and makes a small model of each name in the examples."""
    monkeypatch.chdir(example_files)
    create, small = timm.create_model, {'res2net50d', 'res2net101d', 'res2net50_26w_4s'}
    monkeypatch.setattr(
        timm, 'create_model', lambda name, **kwargs: create('test_res2net' if name in small else name, **kwargs)
    )


def widths(features: Iterable[Tensor]) -> list[int]:
    return [feature.shape[-1] for feature in features]


def are_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    expected = theirs.state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


EXAMPLE_CHECKS: list[tuple[str, str, Callable[..., bool]]] = [  # README, part of the example, check of its variables
    ('top', 'features = backbone', lambda features, **_: widths(features) == [32, 16, 8, 4, 4]),
    ('models', 'ops import FeaturePyramidNetwork', lambda levels, **_: widths(levels.values()) == [16, 8, 4, 2]),
    ('models', 'FasterRCNN', lambda found, **_: found[0].keys() == {'boxes', 'labels', 'scores'}),
    ('models', "style='caffe'", lambda dilated, **_: dilated.layer4[0].convs[0].dilation == (2, 2)),
    ('weights', 'load_checkpoint(model', lambda backbone, model, **_: are_equal(backbone, model)),
    ('weights', 'deeplab', lambda backbone, **_: [x['reduction'] for x in backbone.feature_info] == [2, 4, 8, 16, 16]),
    ('weights', 'num_classes=7', lambda model, **_: model.fc.weight.shape[0] == 7),
    ('weights', 'export_checkpoint', lambda model, **_: are_equal(timm_res2net.load_model('digits.pth'), model)),
    ('deploy', 'load_exported', lambda done, **_: done.agreement == 1 and Path('digits.pt2').exists()),
    ('recipes', 'load_detector', lambda found, **_: found.keys() == {'boxes', 'scores', 'labels'}),
]


@pytest.mark.parametrize(('readme', 'part', 'is_right'), EXAMPLE_CHECKS)
def test_readme_example_makes_what_it_documents(
    readme: str, part: str, is_right: Callable[..., bool], workplace: None
) -> None:
    assert is_right(**run(readme, part))


def test_every_example_of_a_readme_is_tested() -> None:
    others = '85.13 %', 'smp.Unet', 'DetrConfig', 'register_model', 'fast.path', 'torch.int8', '.pull(', 'push_all'
    parts = (*others, *(part for _, part, _ in EXAMPLE_CHECKS))
    assert [code for codes in EXAMPLES.values() for code in codes if not any(part in code for part in parts)] == []


def test_readme_model_examples_build_documented_models(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    create = timm.create_model

    def recorded(name: str, **kwargs: Any) -> torch.nn.Module:
        depth = {} if name == 'res2net50_26w_8s' else shallow(name.partition('.')[0])
        options = {} if name.startswith('test_') else {'device': 'meta', **depth}  # makes no weights, to save time
        made[name] = create(name, **kwargs, **options)
        return made[name]

    monkeypatch.setattr(timm, 'create_model', recorded)
    run('top', '85.13 %')
    assert list(made) == ['res2net50_26w_8s', 'dla60_res2net', 'test_res2net.digits', 'res2net200_vd_26w_4s']
    assert f'{sum(p.numel() for p in made["res2net50_26w_8s"].parameters()) / 1e6:.1f} M parameters' in TEXTS['top']
    assert made['res2net50_26w_8s'].get_submodule('layer1.0').scale == 8
    assert made['dla60_res2net'].feature_info.reduction()[-1] == 8


def test_readme_example_accuracies_equal_weights_table() -> None:
    found = re.findall(r"'([\w.]+)', pretrained=True\)  # ([\d.]+) % top-1", TEXTS['top'])
    assert len(found) == 3
    for name, top1 in found:
        default = next(weights for full, weights in WEIGHTS.items() if f'{full}.'.startswith(f'{name}.'))
        assert f'{default.top1:.2f}' == top1


def test_readme_ultralytics_example_gives_the_documented_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.models._api, 'BUILTIN_MODELS', {})
    x, channels = torch.randn(1, 3, 64, 64), {}
    parts = run('models', 'register_model', **{'is not None': 'is not None, layers=(1, 1, 1, 1)'})['parts']
    for index, part in enumerate(parts, 1):  # ultralytics counts the image as 0
        x = part(x)
        channels[index] = x.shape[1]
    assert [channels[index] for index in (6, 7, 8)] == [512, 1024, 2048]


def test_readme_transformers_example_loads_all_of_the_backbone() -> None:
    layers = 'encoder_layers=1, decoder_layers=1, backbone_config'
    made = run('models', 'DetrConfig', res2net50d='test_res2net', backbone_config=layers)
    loaded, pretrained = made['detector'].model.backbone.model, made['pretrained']
    torch.nn.init.normal_(pretrained.layer4[0].bn3.running_mean)  # not the default that any model has
    loaded.load_state_dict(pretrained.state_dict())
    x = torch.randn(1, 3, 64, 64)
    found, expected = loaded.eval()(x), pretrained.eval()(x)[1:]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


CHECKED = re.findall(r'^\|.*\| (default|`.*=.*`) \| `(.*/.*)` \|$', TEXTS['weights'], re.MULTILINE)


@pytest.mark.parametrize(('arguments', 'file'), CHECKED)
def test_readme_of_weights_documents_the_spec_of_each_checked_file(arguments: str, file: str, references: Any) -> None:
    archive, name = file.split('/')
    documented = {} if arguments == 'default' else eval(f'dict({arguments.strip("`")})')
    assert read_checkpoint(references(archive) / name).spec == NetworkSpec(**documented)
    assert name in (ROOT / 'tests' / 'weights' / 'test_checkpoints.py').read_text()  # which compares the features


def test_readme_of_weights_lists_all_known_networks() -> None:
    assert len(CHECKED) == 19
    rows = dict(re.findall(r'^\| (default|`[a-z_]+=.*`) \| ([^|`]*) \|$', TEXTS['weights'], re.MULTILINE))
    for project in (project for project in PROJECTS if project.spec is not None):
        arguments = project.spec.as_keywords(project.spec.differing_fields(NetworkSpec()))
        assert project.name in rows[f'`{arguments}`' if arguments else 'default'].split('; ')


def test_readme_hub_example_pushes_and_pulls(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HF_TOKEN', 'hf_write')
    made = run('hub', 'timm_res2net.pull', **{'you/': 'user/'})
    assert made['model'].pretrained_cfg['hf_hub_id'].startswith('user/digits@')


@pytest.mark.slow
def test_readme_example_for_many_models_checks_all_before_it_pushes_any(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_TOKEN', 'hf_write')
    for name in 'ab':
        torch.save(tiny().state_dict(), f'{name}.pth')
    (head,) = re.findall(r'```\n(file,.*)\n', TEXTS['hub'])
    rows = 'a.pth,user/a,97.5,flowers,apache-2.0\nb.pth,user/b,{},flowers,apache-2.0\n'
    Path('zoo.csv').write_text(f'{head}\n{rows.format(9750)}')
    (problem,) = run('hub', 'push_all')['problems']
    assert problem.startswith('user/b: invalid results: accuracy is 9750.0')
    assert hub.log == []
    Path('zoo.csv').write_text(f'{head}\n{rows.format(98)}')
    assert run('hub', 'push_all')['problems'] == []
    assert {*hub.repos} == {'user/a', 'user/b'}


def test_readme_optimize_example_prints_documented_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, 'compile', lambda model, **settings: model)  # takes ten seconds; see test_optimize.py
    small = {"'res2net50_26w_4s'": "'test_res2net', num_classes=1000"}
    made = run('deploy', 'print(fast.path)', **small)
    assert f'print(fast.path)  # {capsys.readouterr().out}' in TEXTS['deploy']
    assert (made['logits'].shape, made['logits'].dtype) == ((8, 1000), torch.float32)


def test_readme_of_deploy_table_of_formats_matches_the_code() -> None:
    for suffix, backend in BACKENDS.items():
        row = rf'^\| `{re.escape(suffix)}`.* \| {", ".join(backend.precisions)} \|$'
        assert re.search(row, TEXTS['deploy'], re.MULTILINE)
    assert f'ONNX, opset {OPSET} ({OPSETS[0]} to {OPSETS[-1]} with' in TEXTS['deploy']


def api_row(name: str) -> str:
    """A row of the table of public names: a name with its signature, and the first line of its docstring."""
    value = getattr(timm_res2net, name)
    if not callable(value):
        return f'| `{name}` | The version of the package. |'
    call = name
    if not isinstance(value, type):
        parameters = [each.replace(annotation=each.empty) for each in inspect.signature(value).parameters.values()]
        call += str(inspect.Signature(parameters))
    return f'| `{call}` | {(inspect.getdoc(value) or "").splitlines()[0]} |'


def test_readme_of_package_lists_every_public_name_with_its_signature_and_docstring() -> None:
    rows = [line for line in TEXTS['timm_res2net'].splitlines() if line.startswith('| `')]
    assert rows == [api_row(name) for name in timm_res2net.__all__]


def test_readme_of_deploy_table_of_8_bits_equals_int8_json() -> None:
    *results, digits = json.loads((ASSETS / 'int8.json').read_text())['results']
    assert [each['model'] for each in results] == list(eight_bits.MODELS)
    rows = {f'| `{x["model"]}` | {100 * x["openvino"]:.1f} % | {100 * x["onnx"]:.1f} % |' for x in (*results, digits)}
    shown = re.findall(r'^\| `.*%.*', TEXTS['deploy'], re.MULTILINE)
    assert len(shown) == 4
    assert {*shown} <= rows
    accuracies = [f'{digits[key]:.2f} %' for key in ('top1', 'openvino_top1', 'onnx_top1')]
    assert f'{accuracies[0]} of its held-out third right, {accuracies[1]} by OpenVINO, {accuracies[2]} by ONNX' in (
        TEXTS['deploy'].replace('\n', ' ')
    )


def test_readme_of_models_lists_feature_strides_and_channels_of_every_model() -> None:
    rows: dict[tuple[str, str], list[str]] = {}
    for name in ARCHS:
        model: Any = timm.create_model(name, device='meta', **shallow(name))
        pyramid = ', '.join(f'{info["reduction"]}: {info["num_chs"]}' for info in model.feature_info)
        rows.setdefault((pyramid, ', '.join(map(str, strides(name)))), []).append(f'`{name}`')
    for (pyramid, possible), names in rows.items():
        assert f'| {", ".join(names)} | {pyramid} | {possible} |' in TEXTS['models']


*INFERENCE, TRAINING = json.loads((ASSETS / 'speed.json').read_text())['runs']  # each as `bench --json` writes it


def test_readme_of_recipes_table_of_memory_equals_speed_json() -> None:
    results = TRAINING['training']
    rows = {f'| {x["way"]} | {x["ratio"]:.2f} | {x["peak_memory"] / 1e6:,.0f} |' for x in results}
    shown = re.findall(r'^\| timm.*\d \|', TEXTS['recipes'], re.MULTILINE)
    assert len(shown) == 3
    assert {*shown} <= rows
    model = timm.create_model(results[0]['model'], device='meta')
    gradients_and_momenta = 2 * 4 * sum(parameter.numel() for parameter in model.parameters())
    assert f'{gradients_and_momenta / 1e6:.0f} MB are gradients and momenta' in ' '.join(TEXTS['recipes'].split())


def test_readme_table_of_models_has_their_size_accuracy_and_speed() -> None:
    results = INFERENCE[0]['inference']  # on the Zen 4
    fastest = 'timm_res2net, OpenVINO', 'int8', 1
    ways = [each for each in results if (each['way'], each['dtype'], each['batch']) == fastest]
    speeds = {each['model']: f'{each["ratio"]:.1f}x' for each in ways}
    rows = re.findall(r'^\| `(\w+)` \| ([\d.]+) M \| ([\d.]+) % \| ([\w ]+) \| ?(\S*) \|$', TEXTS['top'], re.MULTILINE)
    assert len(rows) == 6
    for name, params, top1, _, speed in rows:
        default = next(weights for full, weights in WEIGHTS.items() if full.startswith(f'{name}.'))
        assert (params, top1) == (f'{ARCHS[name].params / 1e6:.1f}', f'{default.top1:.2f}')
        assert speed == speeds.get(name, '')


@pytest.mark.parametrize(('processor', 'run'), [*zip(('Zen 4', 'Xeon'), INFERENCE)], ids=['Zen 4', 'Xeon'])
def test_readme_of_deploy_speed_table_equals_speed_json(processor: str, run: dict[str, Any]) -> None:
    ratios: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for each in run['inference']:
        of_way = ratios.setdefault((each['way'], each['dtype']), {})
        of_way.setdefault(each['model'], {})[each['batch']] = each['ratio']
    rows = set()
    for (way, dtype), models in ratios.items():
        cells = [f'{each[1]:.2f} / {each[8]:.2f}' for each in models.values()]
        rows.add(f'| {" | ".join([f"{way}, {dtype}", processor, *cells])} |')
    shown = re.findall(rf'^\| timm.*\| {processor} \|.*', TEXTS['deploy'], re.MULTILINE)
    assert len(shown) == 7
    assert {*shown} <= rows
