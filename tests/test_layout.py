"""The house: leaves that stand alone, six packages, a README that names what exists."""
import ast
import importlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser

LEAVES = ('mask', 'sampler', 'vit', 'losses', 'images', 'phantom', 'run', 'metrics', 'retinanet', 'detr')
USES = {'images', 'phantom', 'vit', 'datasets', 'metrics', 'run', 'score'}
MAY_IMPORT = {**{leaf: set() for leaf in LEAVES}, 'prepare': {'images', 'mask', 'run'},
              'pretrain': set(LEAVES) - {'detr', 'retinanet'}, 'datasets': {'images'},
              'score': {'metrics', 'run', 'datasets'}, 'finetune': USES,
              'detect': USES | {'retinanet', 'detr'}, 'fuse': USES | {'detect', 'mask', 'retinanet', 'detr'}}
PACKAGES = {'torch', 'numpy', 'PIL', 'pydicom', 'scipy', 'tqdm'}
SCRIPTS = ['pretrain', 'finetune', 'detect', 'fuse']


def source(name):
    return (ROOT / f'{name}.py').read_text()


def test_leaves_import_no_sibling_and_no_file_imports_a_seventh_package():
    for name, allowed in MAY_IMPORT.items():
        if not (ROOT / f'{name}.py').exists():
            continue
        imported = set()
        for node in ast.parse(source(name)).body:           # a demonstration may import others when it runs
            if isinstance(node, ast.Import):
                imported |= {alias.name.split('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split('.')[0])
        assert imported - set(sys.stdlib_module_names) <= allowed | PACKAGES, name


@pytest.mark.parametrize('leaf', LEAVES)
def test_a_leaf_works_in_an_empty_folder(leaf, tmp_path):
    (tmp_path / f'{leaf}.py').write_text(source(leaf))
    done = subprocess.run([sys.executable, '-c', f'import {leaf}'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_requirements_are_the_six_packages():
    lines = [line for line in (ROOT / 'requirements.txt').read_text().splitlines() if line and not line.startswith('#')]
    assert {re.split(r'[=~><]', line)[0] for line in lines} == {'torch', 'numpy', 'pillow', 'pydicom', 'scipy', 'tqdm'}
    assert 'torch==2.13.0' in lines


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_shows_the_docstring_and_every_flag_with_its_source_in_groups(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit, match='0'):
        module.parse(module.Config, ['--help'])
    shown = capsys.readouterr().out
    assert module.__doc__.splitlines()[0] in shown
    for name in re.findall(r'^    (\w+): .*option\(', source(script), re.M):
        assert re.search(rf'^  --{name}\b[^[]*\[[^]]+\]', shown, re.M | re.S), name
    for group in re.findall(r"group='([^']+)'\)$", source(script), re.M):
        assert f'\n{group}:\n' in shown


@pytest.mark.parametrize('script', SCRIPTS)
def test_no_flag_is_taken_for_an_abbreviated_one_of_torchrun(script):
    """torchrun refuses what could be several of its options, even behind the name of the script."""
    theirs = get_args_parser()._option_string_actions
    for name in re.findall(r'^    (\w+): .*option\(', source(script), re.M):
        assert not any(option.startswith(f'--{name}') for option in theirs), name


def test_the_readme_names_only_what_exists():
    readme = (ROOT / 'README.md').read_text()
    named = re.findall(rf"\b({'|'.join(MAY_IMPORT)})\.py:(\w+)", readme)
    assert len(named) > 15
    for module, name in named:
        assert re.search(rf'^\s*(def|class) {name}\b|^{name}\s*[:=]', source(module), re.M), f'{module}.py:{name}'
    for picture in re.findall(r'\]\((\.github/figures/[^)]+)\)', readme):
        assert (ROOT / picture).exists(), picture
    fields = {name for script in SCRIPTS for name in re.findall(r'^    (\w+): .*option\(', source(script), re.M)}
    known = fields | {'help', 'side', 'voi', 'percentiles', 'checkpoint', 'labels', 'boxes', 'threshold'}
    tests = ''.join(path.read_text() for path in (ROOT / 'tests').glob('test_*.py'))
    for test in set(re.findall(r'`(test_\w+)`', readme)):
        assert f'def {test}(' in tests, test
    for flag in re.findall(r'`--(\w+)', readme):
        assert flag in known or flag.startswith(('nproc', 'no', 'shutdown', 'max')), flag


def test_the_table_of_symbols_names_fields_that_exist():
    readme = (ROOT / 'README.md').read_text()
    rows = readme[readme.index('| symbol |'):].split('\n\n')[0].splitlines()[2:]
    fields = set(re.findall(r'^    (\w+): .*option\(', source('pretrain'), re.M))
    named = {name for row in rows for name in re.findall(r'`(\w+)`', row.split('|')[3])}
    assert len(rows) > 15 and len(named) > 20 and named <= fields, named - fields


def test_the_readme_gives_the_length_of_each_file():
    for name, lines in re.findall(r'\| `(\w+)\.py` \| (\d+) \|', (ROOT / 'README.md').read_text()):
        assert abs(len(source(name).splitlines()) - int(lines)) <= 30, f'{name}.py has {len(source(name).splitlines())}'


def test_the_bench_prints_its_rows():
    """A quick row, once round: not a measurement, but a bench that no longer runs is noticed."""
    done = subprocess.run([sys.executable, ROOT / 'tests' / 'bench.py', 'masks', '--rounds', '1'], capture_output=True,
                          text=True)
    assert done.returncode == 0 and 'patch masks' in done.stdout, done.stderr
