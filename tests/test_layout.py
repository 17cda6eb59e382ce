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
README = (ROOT / 'README.md').read_text()
SOURCE = {name: (ROOT / f'{name}.py').read_text() for name in MAY_IMPORT}
FLAGS = {script: re.findall(r'^    (\w+): .*option\(', SOURCE[script], re.M)
         for script in ('pretrain', 'finetune', 'detect', 'fuse')}


def test_leaves_import_no_sibling_and_no_file_imports_a_seventh_package():
    for name, allowed in MAY_IMPORT.items():
        imported = set()
        for node in ast.parse(SOURCE[name]).body:           # a demonstration may import others when it runs
            if isinstance(node, ast.Import):
                imported |= {alias.name.split('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split('.')[0])
        assert imported - set(sys.stdlib_module_names) <= allowed | PACKAGES, name
    lines = [line for line in (ROOT / 'requirements.txt').read_text().splitlines() if line and line[0] != '#']
    assert {re.split(r'[=~><]', line)[0] for line in lines} == PACKAGES - {'PIL'} | {'pillow'}


@pytest.mark.parametrize('leaf', LEAVES)
def test_a_leaf_works_in_an_empty_folder(leaf, tmp_path):
    (tmp_path / f'{leaf}.py').write_text(SOURCE[leaf])
    done = subprocess.run([sys.executable, '-c', f'import {leaf}'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('script', FLAGS)
def test_help_shows_the_docstring_and_every_flag_with_its_source_in_groups(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit, match='0'):
        module.parse(module.Config, ['--help'])
    shown = capsys.readouterr().out
    assert module.__doc__.splitlines()[0] in shown
    for name in FLAGS[script]:
        assert re.search(rf'^  --{name}\b[^[]*\[[^]]+\]', shown, re.M | re.S), name
    for group in re.findall(r"group='([^']+)'\)$", SOURCE[script], re.M):
        assert f'\n{group}:\n' in shown


@pytest.mark.parametrize('script', FLAGS)
def test_no_flag_is_taken_for_an_abbreviated_one_of_torchrun(script):
    """torchrun refuses what could be several of its options, even behind the name of the script."""
    theirs = get_args_parser()._option_string_actions
    for name in FLAGS[script]:
        assert not any(option.startswith(f'--{name}') for option in theirs), name


def test_the_readme_names_only_what_exists():
    named = re.findall(rf"\b({'|'.join(MAY_IMPORT)})\.py:(\w+)", README)
    assert len(named) > 15
    for module, name in named:
        assert re.search(rf'^\s*(def|class) {name}\b|^{name}\s*[:=]', SOURCE[module], re.M), f'{module}.py:{name}'
    for picture in re.findall(r'\]\((\.github/figures/[^)]+)\)', README):
        assert (ROOT / picture).exists(), picture
    known = {'help', 'side', 'voi', 'percentiles', 'checkpoint', 'labels', 'boxes', 'threshold'}.union(*FLAGS.values())
    tests = ''.join(path.read_text() for path in (ROOT / 'tests').glob('test_*.py'))
    for test in set(re.findall(r'`(test_\w+)`', README)):
        assert f'def {test}(' in tests, test
    for flag in re.findall(r'`--(\w+)', README):
        assert flag in known or flag.startswith(('nproc', 'no', 'shutdown', 'max')), flag
    for name, lines in re.findall(r'\| `(\w+)\.py` \| (\d+) \|', README):
        assert abs(len(SOURCE[name].splitlines()) - int(lines)) <= 30, name


def test_the_table_of_symbols_names_fields_that_exist():
    rows = README[README.index('| symbol |'):].split('\n\n')[0].splitlines()[2:]
    named = {name for row in rows for name in re.findall(r'`(\w+)`', row.split('|')[3])}
    assert len(rows) > 15 and len(named) > 20 and named <= set(FLAGS['pretrain']), named


def test_the_bench_prints_its_rows():
    """A quick row, once round: not a measurement, but a bench that no longer runs is noticed."""
    done = subprocess.run([sys.executable, ROOT / 'tests' / 'bench.py', 'masks', '--rounds', '1'], capture_output=True,
                          text=True)
    assert done.returncode == 0 and 'patch masks' in done.stdout, done.stderr
