"""What is promised of all scripts together: no header value gets out, nothing is written elsewhere, broken input is
refused in one sentence."""
import subprocess
import sys
import zipfile

import numpy as np
from conftest import ROOT, here, run_here
from PIL import Image
from test_images import dicom

import detect
import finetune
import phantom
import prepare


SECRETS = dict(PatientName='Zaphod^Beeblebrox', PatientID='QX4711ZZ', PatientBirthDate='19520311',
               InstitutionName='Vogon General', AccessionNumber='ACC998877', ReferringPhysicianName='Marvin^Android',
               StudyDescription='Towelscreening', PatientAddress='Magrathea 42', StudyInstanceUID='1.9.8.7.6.54321',
               WindowCenterWidthExplanation='Heartofgold')


def test_no_header_value_is_written_anywhere(tmp_path, monkeypatch, capfd):
    """prepare, pretrain, finetune and detect over DICOM files with a patient in them, one of them damaged; then every
    byte of what they wrote, in archives and pictures too, and every word they said."""
    raw, out = tmp_path / 'raw', tmp_path / 'out'
    raw.mkdir()
    lines = ['path,patient,cancer,x0,y0,x1,y1,frame,split']
    for i in range(20):
        example = phantom.breast(np.random.default_rng(i), lesion=True, slices=2 if i == 0 else 1, height=280,
                                 width=210)
        dicom(raw / f'{i}.dcm', example.volume, **SECRETS, WindowCenter=128, WindowWidth=200, PatientAge='070Y',
              RescaleSlope='12345678', RescaleIntercept=0)
        z, *box = example.boxes[0]
        box = ','.join(f'{v:.1f}' for v in box)
        lines.append(f"{i}.dcm,p{i},{i % 2},{box},{int(z)},{('train', 'train', 'val', 'test')[i // 2 % 4]}")
    (raw / '19.dcm').write_bytes((raw / '19.dcm').read_bytes()[:-30_000])               # cut short
    (raw / '18.dcm').write_bytes((raw / '18.dcm').read_bytes().replace(b'12345678', b'QX4711ZZ'))   # no slope
    (raw / 'manifest.csv').write_text('\n'.join(lines) + '\n')

    prepare.prepare(raw, out / 'prepared', workers=1)
    here(out / 'run', '--data', out / 'prepared', '--small', '--workers', 1, '--steps', 3)
    shared = ['--root', raw, '--encoder', out / 'run' / 'last.pt', '--workers', 0]
    run_here(finetune, '--dataset', 'csv', '--task', 'cancer', '--head', 'linear', '--epochs', 2, '--draws', 20,
             '--cache', out / 'cache', '--out', out / 'heads', *shared)
    run_here(detect, '--dataset', 'csv', '--epochs', 1, '--size', 84, '--channels', 32, '--batch', 4, '--draws', 20,
             '--min_distance', 10, '--out', out / 'boxes', *shared)
    monkeypatch.chdir(out)
    run_here(detect, 'predict', raw / '1.dcm', '--checkpoint', out / 'boxes', '--threshold', 0.001)
    run_here(finetune, 'predict', raw / '1.dcm', '--checkpoint', out / 'heads')

    told = capfd.readouterr()
    written = {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
    assert len(written) > 40
    for path in list(written):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as members:
                written |= {f'{path}/{name}': members.read(name) for name in members.namelist()}
        elif path.suffix == '.png':
            written[f'{path}/info'] = repr(Image.open(path).info).encode()
    written |= {'terminal': (told.out + told.err).encode(), 'names': '\n'.join(map(str, written)).encode()}
    for secret in {part for value in SECRETS.values() for part in value.split('^')}:
        found = [str(path) for path, data in written.items() if secret.encode() in data
                 or secret.encode('utf-16-le') in data]
        assert not found, (secret, found)


def test_a_few_hundred_damaged_files_of_every_kind_are_read_or_refused_in_one_line():
    done = subprocess.run([sys.executable, ROOT / 'tests' / 'fuzz.py', '--inputs', '600'], capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.endswith(', 0 faults\n'), done.stdout + done.stderr
