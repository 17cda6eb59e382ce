"""prepare.py: every mammogram of a folder once, whole; everything else named with its reason, and nothing lost."""
import csv
import functools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_images import dicom, ramp

import images
import phantom
import prepare

COMMAND = [sys.executable, ROOT / 'prepare.py']


def breast(seed=0, slices=1, **changes):
    return phantom.breast(np.random.default_rng(seed), slices=slices, **dict(height=280, width=210) | changes).volume


def rows(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folders(tmp_path):
    (tmp_path / 'raw').mkdir()
    return tmp_path / 'raw', tmp_path / 'out'


def test_a_folder_becomes_arrays_with_an_index_and_goes_on_where_it_stopped(folders, capsys):
    raw, out = folders
    (raw / 'a' / 'b').mkdir(parents=True)
    volume = breast(slices=3, height=300, width=240)
    dicom(raw / 'a' / 'volume.dcm', volume)
    Image.fromarray(breast()[0]).save(raw / 'a' / 'b' / 'image.png')
    Image.fromarray(breast()[0]).save(raw / 'a' / 'b' / 'image.tif')
    (raw / 'broken.dcm').write_text('no')
    assert prepare.prepare(raw, out, side=200, workers=2) == (2, 0, 2)
    kept = np.load(out / 'a' / 'volume.npy')
    assert kept.shape == (3, 250, 200) and kept.dtype == np.uint8
    expected = Image.fromarray(images.clahe(images.read(raw / 'a' / 'volume.dcm', 2))).resize((200, 250), Image.BICUBIC)
    np.testing.assert_array_equal(kept[2], np.asarray(expected))
    assert (out / 'index.csv').read_text().splitlines() == [
        'path,slices,height,width', 'a/b/image.npy,1,267,200', 'a/volume.npy,3,250,200']
    assert [(row['file'], row['reason'][:20]) for row in rows(out / 'rejected.csv')] == [
        ('a/b/image.tif', 'becomes the same fil'), ('broken.dcm', 'empty, or not a DICO')]
    said = capsys.readouterr().out
    assert f'2 written, 0 were there, 2 rejected and named in {out}/rejected.csv' in said
    assert '       1  becomes the same file as another\n' in said
    os.remove(out / 'a' / 'volume.npy')
    before = os.stat(out / 'a' / 'b' / 'image.npy').st_mtime_ns
    assert prepare.prepare(raw, out, side=200, workers=1) == (1, 1, 2)
    assert os.stat(out / 'a' / 'b' / 'image.npy').st_mtime_ns == before
    assert not [path for path in out.rglob('*') if path.suffix == '.part']


def test_two_folders_can_be_prepared_into_one(folders, tmp_path):
    raw, out = folders
    (tmp_path / 'more').mkdir()
    for seed, path in enumerate((raw / 'a.npy', tmp_path / 'more' / 'b.npy')):
        np.save(path, breast(seed)[0])
        assert prepare.prepare(path.parent, out, workers=1) == (1, 0, 0)
    assert [row['path'] for row in rows(out / 'index.csv')] == ['a.npy', 'b.npy']


def test_what_is_no_mammogram_is_refused_by_name(folders):
    raw, out = folders
    image, capture = breast()[0].astype(np.uint16) * 16, '1.2.840.10008.5.1.4.1.1.7'
    outlier = np.where(np.eye(*image.shape), 65535, image // 8).astype(np.uint16)
    two = np.where(image > 300, 255, 0).astype(np.uint8)
    volume, dust = np.stack([image, two, image]), np.random.default_rng(0).random(image.shape)
    plain = dict(SOPClassUID='1.2.840.10008.5.1.4.1.1.1.2')
    expected = {}
    for name, pixels, elements, reason in [
            ('mammogram', image, plain, None), ('film', image, dict(SOPClassUID=capture), None),
            ('digitised', image, dict(SOPClassUID=capture, Modality='RG'), None),
            ('full', image, dict(SOPClassUID=capture, SeriesDescription='full mammogram images'), None),
            ('screen', image, dict(SOPClassUID=capture, Modality='OT'), 'a secondary capture that is no radiograph'),
            ('report', image, dict(SOPClassUID=f'{capture}.2', Modality=None), 'a secondary capture'),
            ('crop', image, dict(SeriesDescription='cropped images'), 'a crop of a lesion'),
            ('seg', image, dict(SOPClassUID='1.2.840.10008.5.1.4.1.1.66.4', Modality='SEG'), 'a segmentation object'),
            ('roi', two, plain, 'two grey values'), ('late', volume, plain, 'two grey values'),
            ('constant', image * 0, plain, 'a constant image'), ('small', image[:, :195], plain, 'too small: 195x280'),
            ('outlier', outlier, plain, 'fewer than 32 greys in the tissue: '),
            ('dust', np.where(dust < 0.01, 65535 * dust, 0).astype(np.uint16), plain, 'no tissue: in frame 0')]:
        dicom(raw / f'{name}.dcm', pixels, **elements)
        expected |= {f'{name}.dcm': reason} if reason else {}
    assert prepare.prepare(raw, out, workers=1) == (4, 0, len(expected))
    assert expected.keys() == {row['file'] for row in rows(out / 'rejected.csv')}
    for row in rows(out / 'rejected.csv'):
        assert row['reason'].startswith(expected[row['file']]), row
    assert '--percentiles LOW HIGH' in (out / 'rejected.csv').read_text()
    assert prepare.prepare(raw, out, workers=1, percentiles=(0.5, 99)) == (1, 4, len(expected) - 1)


def test_the_window_and_the_contrast_are_choices(folders):
    raw, out = folders
    image = breast()[0].astype(np.uint16) * 16
    dicom(raw / 'a.dcm', image, WindowCenter=1500, WindowWidth=2000)
    prepare.main([str(raw), str(out), '--voi', '--no-clahe', '--workers', '1'])
    np.testing.assert_array_equal(np.load(out / 'a.npy'), images.read(raw / 'a.dcm', voi=True))


def test_a_refused_run_leaves_no_folder(folders):
    raw, out = folders
    with pytest.raises(ValueError, match='no DICOM'):
        prepare.prepare(raw, out)
    np.save(raw / 'a.npy', ramp(shape=(300, 300)))
    for wrong, words in [(dict(prepared=raw / 'inside'), 'one lies in the other'), (dict(side=0), '--side'),
                         (dict(prepared=raw.parent), 'one lies in the other'), (dict(workers=0), '--workers'),
                         (dict(percentiles=(9, 1)), 'LOW < HIGH')]:
        with pytest.raises(ValueError, match=words):
            prepare.prepare(raw, **dict(prepared=out) | wrong)
    assert not out.exists() and not (raw / 'inside').exists()


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_prepare_leaves_whole_files_and_goes_on(how, folders):
    """Two seconds of work for one process, so that there is time to stop it; one large film under many names."""
    raw, out = folders
    np.save(raw / '0.npy', np.asarray(Image.fromarray(breast()[0]).resize((2400, 3000))).astype(np.uint16))
    for i in range(1, 16):
        os.link(raw / '0.npy', raw / f'{i}.npy')
    command = [*COMMAND, raw, out, '--workers', '1']
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # a job ignores it
    while not list(out.glob('*.npy')):
        time.sleep(0.01)
        assert started.poll() is None
    os.killpg(started.pid, how)                             # what Ctrl-C and schedulers send, to the workers too
    words = started.communicate(timeout=60)[1]
    assert started.returncode == 1 and words.endswith('the same command goes on from here\n'), words
    assert 'Traceback' not in words
    whole = len(list(out.glob('*.npy')))
    assert 0 < whole < 16 and not list(out.glob('*.part')) and not (out / 'index.csv').exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert f'{16 - whole} written, {whole} were there' in again.stdout, again
    assert len({path.read_bytes() for path in out.glob('*.npy')}) == 1 and len(rows(out / 'index.csv')) == 16


@pytest.mark.parametrize('workers, words', [
    (2, '--workers 1 names the file'), (1, '3.npy, move it away')])
def test_a_decoder_that_kills_its_process_ends_the_run_and_one_worker_names_it(workers, words, folders, monkeypatch):
    raw, out = folders
    for i in range(6):
        np.save(raw / f'{i}.npy', breast(i)[0])
    read = images.read

    def crash(path, *how):
        if path.endswith('3.npy'):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path, *how)

    monkeypatch.setattr(images, 'read', crash)              # the processes are forked, and so have it too
    monkeypatch.setattr(prepare, 'ProcessPoolExecutor', functools.partial(
        ProcessPoolExecutor, mp_context=multiprocessing.get_context('fork')))
    with pytest.raises(ValueError, match=f'{words}; the same command goes on from here'):
        prepare.prepare(raw, out, workers=workers)
    assert not list(out.glob('*.part')) and not (out / 'index.csv').exists()
    os.remove(raw / '3.npy')
    monkeypatch.undo()
    written, skipped, rejected = prepare.prepare(raw, out, workers=1)
    assert written + skipped == 5 and not rejected and (workers > 1 or skipped == 3)


def test_a_full_disk_ends_the_run_in_words_and_leaves_no_litter(folders):
    raw, out = folders
    for i, size in enumerate((210, 210, 512)):
        np.save(raw / f'{i}.npy', breast(i, height=size, width=size)[0])
    command = [*COMMAND, raw, out, '--workers', '1']
    full = subprocess.run(command, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2))
    assert full.returncode == 1 and f'{out}: cannot be written' in full.stderr, full
    assert full.stderr.endswith('the same command goes on from here\n') and 'Traceback' not in full.stderr
    assert set(os.listdir(out)) <= {'.lock', '0.npy', '1.npy'}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and f'next: torchrun pretrain.py --data {out}\n' in again.stdout, again
    assert np.load(out / '2.npy').shape == (512, 512)


def test_a_folder_without_a_mammogram_ends_with_status_1(folders):
    raw, out = folders
    (raw / 'a.png').write_text('no')
    done = subprocess.run([*COMMAND, raw, out], capture_output=True, text=True)
    assert done.returncode == 1 and 'not one file could be prepared' in done.stderr and 'rejected.csv' in done.stdout
