"""prepare.py: every mammogram of a folder once, whole; all else named with its reason, and nothing lost."""
import csv
import errno
import functools
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_images import dicom

import images
import phantom
import prepare

GO_ON = 'the same command goes on from here'


def breast(seed=0, slices=1, height=280, width=210):
    """uint8 (H, W), or (K, H, W) of several slices."""
    volume = phantom.breast(np.random.default_rng(seed), slices=slices, height=height, width=width).volume
    return volume if slices > 1 else volume[0]


def rows(path):
    with open(path, newline='') as file:
        return list(csv.reader(file))[1:]


@pytest.fixture
def folders(tmp_path):
    (tmp_path / 'raw').mkdir()
    return tmp_path / 'raw', tmp_path / 'out'


def test_a_folder_becomes_arrays_with_an_index_and_goes_on_where_it_stopped(folders):
    raw, out = folders
    (raw / 'a' / 'b').mkdir(parents=True)
    dicom(raw / 'a' / 'volume.dcm', breast(slices=3, height=300, width=240))
    for name in ('image.png', 'image.tif'):
        Image.fromarray(breast()).save(raw / 'a' / 'b' / name)
    (raw / 'broken.dcm').write_text('no')
    assert prepare.prepare(raw, out, side=200, workers=2) == (2, 0, 2)

    kept = np.load(out / 'a' / 'volume.npy')
    frame = Image.fromarray(images.clahe(images.read(raw / 'a' / 'volume.dcm', 2)))
    assert kept.shape == (3, 250, 200) and kept.dtype == np.uint8
    np.testing.assert_array_equal(kept[2], frame.resize((200, 250), Image.Resampling.BICUBIC))
    assert (out / 'index.csv').read_text() == (
        'path,slices,height,width\na/b/image.npy,1,267,200\na/volume.npy,3,250,200\n')
    assert [(name, reason[:20]) for name, reason in rows(out / 'rejected.csv')] == [
        ('a/b/image.tif', 'becomes the same fil'), ('broken.dcm', 'empty, or not a DICO')]

    os.remove(out / 'a' / 'volume.npy')
    before = os.stat(out / 'a' / 'b' / 'image.npy').st_mtime_ns
    assert prepare.prepare(raw, out, side=200, workers=1) == (1, 1, 2)
    assert os.stat(out / 'a' / 'b' / 'image.npy').st_mtime_ns == before
    assert prepare.prepare(raw / 'a' / 'b', out, workers=1) == (1, 0, 1)        # another folder into the same
    assert [path for path, *_ in rows(out / 'index.csv')] == ['a/b/image.npy', 'a/volume.npy', 'image.npy']


def test_what_is_no_mammogram_is_refused_by_name(folders):
    raw, out = folders
    image = breast().astype(np.uint16) * 16
    roi = np.where(image > 300, 255, 0).astype(np.uint8)
    outlier = np.where(np.eye(*image.shape), 65535, image // 8).astype(np.uint16)
    noise = np.random.default_rng(0).random(image.shape)
    dust = np.where(noise < 0.01, 65535 * noise, 0).astype(np.uint16)
    capture = dict(SOPClassUID='1.2.840.10008.5.1.4.1.1.7')
    files = [
        ('mammogram', image, {}, None),
        ('film', image, capture | dict(SeriesDescription='full mammogram images'), None),
        ('digitised', image, capture | dict(Modality='RG'), None),
        ('screen', image, capture | dict(Modality='OT'), 'a secondary capture that is no radiograph'),
        ('report', image, capture | dict(Modality=None), 'a secondary capture'),
        ('crop', image, dict(SeriesDescription='cropped images'), 'a crop of a lesion'),
        ('seg', image, dict(SOPClassUID='1.2.840.10008.5.1.4.1.1.66.4'), 'a segmentation object'),
        ('late', np.stack([image, roi, image]), {}, 'two grey values'),
        ('constant', image * 0, {}, 'a constant image'),
        ('small', image[:, :195], {}, 'too small: 195x280'),
        ('outlier', outlier, {}, 'fewer than 32 greys in the tissue: try --percentiles LOW HIGH'),
        ('dust', dust, {}, 'no tissue: in frame 0')]
    for name, pixels, elements, _ in files:
        dicom(raw / f'{name}.dcm', pixels, **elements)
    expected = {f'{name}.dcm': reason for name, _, _, reason in files if reason}
    assert prepare.prepare(raw, out, workers=1) == (3, 0, len(expected))
    rejected = dict(rows(out / 'rejected.csv'))
    assert rejected.keys() == expected.keys()
    assert all(rejected[name].startswith(expected[name]) for name in expected), rejected
    assert prepare.prepare(raw, out, workers=1, percentiles=(0.5, 99)) == (1, 3, len(expected) - 1)


def test_the_window_and_the_contrast_are_choices(folders):
    raw, out = folders
    dicom(raw / 'a.dcm', breast().astype(np.uint16) * 16, WindowCenter=1500, WindowWidth=2000)
    prepare.main([str(raw), str(out), '--voi', '--no-clahe', '--workers', '1'])
    np.testing.assert_array_equal(np.load(out / 'a.npy'), images.read(raw / 'a.dcm', voi=True))


def test_folders_in_each_other_and_a_folder_without_a_mammogram_are_refused(folders):
    raw, out = folders
    (raw / 'a.png').write_text('no')
    for prepared in (raw / 'inside', raw.parent):
        with pytest.raises(ValueError, match='one lies in the other'):
            prepare.prepare(raw, prepared)
    with pytest.raises(ValueError, match='not one file could be prepared'):
        prepare.main([str(raw), str(out)])
    assert os.listdir(raw) == ['a.png'] and len(rows(out / 'rejected.csv')) == 1


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_prepare_leaves_whole_files_and_goes_on(how, folders):
    """A second of work for one process, so that there is time to stop it: a large film of eight names."""
    raw, out = folders
    np.save(raw / '0.npy', np.asarray(Image.fromarray(breast()).resize((2400, 3000))).astype(np.uint16))
    for i in range(1, 8):
        os.link(raw / '0.npy', raw / f'{i}.npy')
    command = [sys.executable, ROOT / 'prepare.py', raw, out, '--workers', '1']
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not list(out.glob('*.npy')):
        time.sleep(0.01)
        assert started.poll() is None
    if how == signal.SIGKILL:
        os.kill(started.pid, how)           # of the parent alone; the pipe below closes when its worker ends
        assert not started.communicate(timeout=60)[1]
    else:
        os.killpg(started.pid, how)         # what Ctrl-C and schedulers send, to the workers too
        words = started.communicate(timeout=60)[1]
        assert started.returncode == 1 and words.endswith(f'{GO_ON}\n') and 'Traceback' not in words, words
        assert not list(out.glob('*.part'))
    whole = len(list(out.glob('*.npy')))
    assert 0 < whole < 8 and not (out / 'index.csv').exists()
    assert prepare.prepare(raw, out, workers=1) == (8 - whole, whole, 0)
    assert len({path.read_bytes() for path in out.glob('*.npy')}) == 1 and len(rows(out / 'index.csv')) == 8


def die():
    os.kill(os.getpid(), signal.SIGKILL)                    # as gdcm does over some damaged streams


def full():
    raise OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('fault, workers, words', [
    (die, 2, '--workers 1 names the file'), (die, 1, '3.npy, move it away'), (full, 1, '3.npy cannot be written')])
def test_a_lethal_decoder_and_a_full_disk_end_the_run_and_one_worker_names_the_file(
        fault, workers, words, folders, monkeypatch):
    raw, out = folders
    for i in range(8):
        np.save(raw / f'{i}.npy', breast(i))
    files = itertools.count()
    monkeypatch.setattr(os, 'fsync', lambda _: next(files) == 3 and fault())
    monkeypatch.setattr(prepare, 'ProcessPoolExecutor', functools.partial(      # a forked process has it too
        ProcessPoolExecutor, mp_context=multiprocessing.get_context('fork')))
    with pytest.raises((ValueError, OSError), match=f'{words}.*; {GO_ON}'):
        prepare.prepare(raw, out, workers=workers)
    assert not list(out.glob('*.part')) and not (out / 'index.csv').exists()
