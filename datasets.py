"""Mammography data sets, as published, become rows with labels and boxes (MammoDINO 3.3; DBT-DINO 2.1).

    rows, notes = load('vindr', 'VINDR')            # rsna, vindr, cbis, cmmd, cesm, mias, bcs or csv
    row.path, row.patient, row.split, row.labels['density'], row.boxes

finetune.py takes the labels, detect.py the boxes. A data set and a seed have one split for both, so an
encoder that was finetuned on a data set has never seen the test patients of a detector.

Frames count from 0, boxes are x0 y0 x1 y1 in pixels of the published file, K H W is the size of a file.
What is wrong with a label file raises ValueError: one sentence with the file and the line.
"""
import contextlib
import csv
import hashlib
import io
import math
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import numpy as np
import pydicom
from scipy import ndimage
from tqdm import tqdm

from images import listing, read, shape    # not the module: `images` is a folder below

TASKS = ('cancer', 'lesion', 'lesion_type', 'birads', 'density', 'risk')
TYPES = ('calcification', 'mass', 'both')
CLASSES = dict(                         # data set -> its tasks -> classes in order; '': those that occur
    rsna=dict(cancer='01', birads='120', density='ABCD'),
    vindr=dict(cancer='01', lesion='01', lesion_type='', birads='12345', density='ABCD'),
    cbis=dict(cancer='01', lesion_type=TYPES, birads='', density='1234'),
    cmmd=dict(cancer='01', lesion='01', lesion_type=TYPES),
    cesm=dict(cancer='01', lesion='01', birads='', density='ABCD'),
    mias=dict(cancer='01', lesion='01', lesion_type='', density='FGD'),
    bcs=dict(cancer='01'),
    csv=dict(cancer='01', lesion='01', lesion_type='', birads='', density='abcd',
             risk=('year 1', 'year 2', 'year 3', 'year 4', 'year 5')))
LEVELS = {'rsna': 'breast', 'vindr': 'breast', 'cmmd': 'breast', ('vindr', 'lesion'): 'image',
          ('vindr', 'lesion_type'): 'image', ('csv', 'risk'): 'exam'}       # as their labels are given
REFUSED = {                             # tasks without labels where there is more to say than that
    ('rsna', 'lesion'): 'RSNA has no lesion labels; BI-RADS 0 (recalled) is nearest: --task birads',
    ('vindr', 'cancer'): 'VinDr has no cancer label; choose --cancer_rule birads5 or birads45',
    ('cbis', 'lesion'): 'CBIS-DDSM has no normal breasts; add those of DDSM and use --dataset csv',
    ('cmmd', 'birads'): 'CMMD has no BI-RADS; join the sheet of TOMPEI-CMMD, use --dataset csv'}
CLASSES['ddsm'], REFUSED['ddsm', 'lesion'] = CLASSES['cbis'], REFUSED['cbis', 'lesion']
RULES = dict(vindr=dict(birads5='5', birads45='45'),    # --cancer_rule -> the BI-RADS that count as cancer
             cmmd=dict(unlisted=None))                  # breasts without a row count as healthy
MAX_ABSENT = 0.05                       # share of files that may be absent or unusable


@dataclass
class Row:
    """A mammogram, a DBT volume, or one frame of a volume."""
    path: str                           # of the file to read; another than `file` only with --images
    patient: str
    exam: str = ''                      # of a patient with several; the challenge's StudyUID
    laterality: str = ''                # L or R
    view: str = ''                      # CC, MLO, ...; BCS-DBT: lcc, rmlo2, ...
    split: str = ''                     # train, val or test; '' until `assign` if none is published
    labels: dict = field(default_factory=dict)      # task -> label as text; risk -> see `follow_up`
    boxes: list = field(default_factory=list)       # (frame, x0, y0, x1, y1, kind), pixels of `file`
    normal: bool = True                 # without boxes it may serve as a normal in training
    frame: int | None = None            # None: every frame of the file
    record: dict = field(default_factory=dict)      # its line of the label file, for subgroups
    name: str = ''                      # the path from the data set's folder on
    file: str = ''                      # as published
    shape: tuple | None = None          # (K, H, W) of `file`, once read
    upside: bool = False                # may be stored upside down (BCS-DBT); laterality decides
    unplaced: str = ''                  # why its lesions have no boxes; then no part in detection
    partner: 'Row | None' = None        # the other image of a pair (fuse.py)

    def __post_init__(self):
        self.file = self.file or self.path
        self.labels = {task: label if task == 'risk' else label.removesuffix('.0')
                       for task, label in self.labels.items() if label is not None and len(label)}

    @property
    def key(self):
        """The DBTex challenge's name of an image: patient, study, view."""
        view = self.view if self.upside else self.laterality + self.view    # lcc, but L and CC
        return self.patient, self.exam or self.name, view


# ---- a data set -> rows with splits and files ----------------------------------------------------

def load(name, root, images=None, seed=0, cancer_rule=None, boxes=False, findings=()):
    """-> rows, each with a split, and notes on what was left out, one sentence each.

    images: the folder that prepare.py wrote. cancer_rule: one of RULES. boxes: True for a detector. Then ROI
    masks and the headers of files with boxes are read, images with a lesion of unknown place take no part,
    and test rows with boxes stay even without their file. findings: the kinds of boxes that count, by
    default all."""
    if name not in DATASETS:
        raise ValueError(f'--dataset {name}: expected one of {", ".join(DATASETS)}')
    rules, notes = RULES.get(name, {}), []
    if cancer_rule and cancer_rule not in rules:
        expected = f'one of {", ".join(rules)}' if rules else 'no rule'
        raise ValueError(f'--cancer_rule {cancer_rule} --dataset {name}: expected {expected}')
    rows = DATASETS[name](root, boxes, findings, notes)
    if not rows:
        raise ValueError(f'{root}: no row in a label file of {name}; is it the right folder?')
    home = root if os.path.isdir(root) else os.path.dirname(root) or '.'
    for row in rows:
        row.name = row.name or os.path.relpath(row.path, home)
        row.path = prepared(row.path, home, images) if images else row.path
    # Splits come first, so that neither an absent file nor the rule for cancer changes them.
    rows = assign(rows, seed, notes)
    for row in rows if cancer_rule else ():
        if name == 'vindr':
            row.labels['cancer'] = str(int(row.labels['birads'] in rules[cancer_rule]))
        elif row.labels['lesion'] == '0':
            row.labels['cancer'] = '0'
    if findings:
        keep_findings(rows, findings)
    return drop_unusable(rows, boxes, notes), notes


def assign(rows, seed, notes):
    """Gives every row a split. Published splits stay. A patient who is in two keeps only the test rows. Where
    there is no test set, a fifth of the patients is drawn; where there is no validation set, a fifth of the
    training patients: a fifth of those with a lesion or cancer, and a fifth of the others."""
    splits, has_lesion = defaultdict(set), defaultdict(bool)
    for row in rows:
        splits[row.patient].add(row.split)
        cancer = '1' in map(row.labels.get, ('cancer', 'lesion')) or 1 in row.labels.get('risk', ())
        has_lesion[row.patient] |= cancer or bool(row.boxes)
    published = set().union(*splits.values())
    if published - {'train', 'val', 'test'} and published != {''}:
        raise ValueError(f'splits {", ".join(map(repr, sorted(published)))}: expected train, val, '
                         'test or blank throughout')
    in_two = sorted(patient for patient in splits if len(splits[patient]) > 1)
    kept = [row for row in rows if row.split == 'test' or len(splits[row.patient]) == 1]
    if in_two:
        notes.append(f'{len(in_two)} patients are in two official splits; {len(rows) - len(kept)} '
                     f'images outside the test set take no part: {", ".join(in_two)}')
    for split, source in (('test', ''), ('val', 'train')):
        if not any(row.split == split for row in kept):
            pool = [row for row in kept if row.split == source]
            taken = drawn({row.patient: has_lesion[row.patient] for row in pool}, 0.2, seed)
            for row in pool:
                row.split = split if row.patient in taken else 'train'
    return kept


def drawn(patients, share, seed, rounded=round):
    """A share of {patient: stratum}, of each stratum alike. Seed and names alone set the order, so that a
    smaller share lies in a larger one."""
    strata = defaultdict(list)
    for name in sorted(patients, key=lambda n: hashlib.sha256(f'{seed} {n}'.encode()).digest()):
        strata[patients[name]].append(name)
    return {name for names in strata.values() for name in names[:rounded(share * len(names))]}


def keep_findings(rows, findings):
    """Drops the boxes of other kinds than `findings`; their images are no normals either."""
    kinds = {box[-1] for row in rows for box in row.boxes}
    if not kinds.issuperset(findings):
        raise ValueError(f'--findings {", ".join(findings)}: expected some of '
                         f'{", ".join(sorted(kinds))}')
    for row in rows:
        kept = [box for box in row.boxes if box[-1] in findings]
        row.normal = row.normal and len(kept) == len(row.boxes)
        row.boxes = kept


def prepared(path, home, images):
    """Where prepare.py has put the copy of a file below `home`."""
    copy = Path(images, os.path.relpath(path, home))
    longer = copy.with_name(f'{copy.name}.npy')             # of a UID, which ends in no suffix
    return str(longer if longer.exists() else copy.with_suffix('.npy'))


def drop_unusable(rows, boxes, notes):
    """The rows whose file is there and, for a detector, can hold its boxes. A test row with boxes is kept
    without its file, with shape None: its lesions count as missed."""
    kept, faults = [], []
    for row in tqdm(rows, 'files', delay=2, disable=None):
        try:
            if not os.path.isfile(row.path):
                raise OSError(f'{row.path}: no such file')
            if boxes and row.unplaced:
                raise ValueError(row.unplaced)
            if boxes and row.boxes:
                row.shape = row.shape or shape(row.file)
                slices = int(row.record.get('VolumeSlices') or row.shape[0])    # BCS-DBT says it
                if slices != row.shape[0]:
                    raise ValueError(f'{row.file}: {row.shape[0]} slices, {slices} by its boxes')
        except (ValueError, OSError) as problem:
            faults.append(problem)
            row.shape = None
            if not (boxes and row.boxes and row.split == 'test'):
                continue
        if boxes and row.shape:
            check_boxes(row)
        kept.append(row)
    if faults:
        notes.append(f'{len(faults)} of {len(rows)} files are absent or unusable and take no part; '
                     f'lesions of the test set among them count as missed; the first: {faults[0]}')
    if len(faults) > MAX_ABSENT * len(rows):
        raise ValueError(f'{notes[-1]}; are --root and --images the right folders?')
    return kept


def check_boxes(row):
    """ValueError for a box without area, outside its image, or on a frame that the file does not have."""
    K, H, W = row.shape
    for z, x0, y0, x1, y1, _ in row.boxes:
        if min(x1, W) <= max(x0, 0) or min(y1, H) <= max(y0, 0) or not 0 <= z < K:
            raise ValueError(f'{row.file}: the box {x0:g} {y0:g} {x1:g} {y1:g} on frame {z} has no '
                             f'area or lies outside the file, {K} frames from 0 of {W}x{H} pixels')


# ---- published data sets -------------------------------------------------------------------------
# root, whether boxes are wanted, the kinds that count, notes to add to -> rows

def rsna(root, boxes, findings, notes):
    """RSNA 2022 (Kaggle): train.csv, train_images/<patient>/<image>.dcm. Labels are those of the breast.
    BI-RADS is 1, 2 or 0 (recalled, which gives cancer away) on half of the images."""
    rows = []
    for r in table(f'{root}/train.csv', 'patient_id', 'image_id', 'laterality', 'view', 'cancer',
                   'BIRADS', 'density'):
        path = f'{root}/train_images/{r["patient_id"]}/{r["image_id"]}.dcm'
        labels = dict(cancer=r['cancer'], birads=r['BIRADS'], density=r['density'])
        rows.append(Row(path, r['patient_id'], '', r['laterality'], r['view'], labels=labels,
                        record=r))
    return rows


def vindr(root, boxes, findings, notes):
    """VinDr-Mammo: breast-level_annotations.csv, finding_annotations.csv, images/<study>/<image>.dicom.
    lesion: the image has a box. lesion_type: the first category of its largest box. The kind of a box is
    the first of its categories, or the first among `findings`."""
    lesions, rows = defaultdict(list), []                   # image -> (area, category, box)
    path = f'{root}/finding_annotations.csv'
    for r in table(path, 'image_id', 'finding_categories', 'xmin', 'ymin', 'xmax', 'ymax'):
        if r['xmin']:
            x0, y0, x1, y1 = (number(r, edge, path) for edge in ('xmin', 'ymin', 'xmax', 'ymax'))
            cell = r['finding_categories']
            kinds = re.findall("'([^']+)'", cell)
            if not kinds:
                raise ValueError(f"{path}, line {r.number}: a box of {cell!r}; expected ['Name']")
            kind = next((kind for kind in kinds if kind in findings), kinds[0])
            area = (x1 - x0) * (y1 - y0)
            lesions[r['image_id']].append((area, kinds[0], (0, x0, y0, x1, y1, kind)))
    for r in table(f'{root}/breast-level_annotations.csv', 'study_id', 'image_id', 'laterality',
                   'view_position', 'breast_birads', 'breast_density', 'split'):
        inside = lesions[r['image_id']]
        labels = dict(lesion=str(int(bool(inside))), lesion_type=max(inside)[1] if inside else '',
                      birads=r['breast_birads'].removeprefix('BI-RADS '),
                      density=r['breast_density'].removeprefix('DENSITY '))
        path = f'{root}/images/{r["study_id"]}/{r["image_id"]}.dicom'
        rows.append(Row(path, r['study_id'], '', r['laterality'], r['view_position'],
                        r['split'].removesuffix('ing'), labels, [box for *_, box in inside],
                        record=r))
    return rows


def cbis(root, boxes, findings, notes):
    """CBIS-DDSM: {mass,calc}_case_description_{train,test}_set.csv, one row per abnormality. A film is one
    Row: cancer, BI-RADS and density are the highest of its abnormalities, the boxes those of their ROI
    masks. Files are found by folder, Mass-Training_P_00001_LEFT_CC, or by series UID."""
    films, files_in, rows = defaultdict(list), defaultdict(list), []     # films: the lesions of each
    for path in sorted(Path(root).glob('????_case_description_*_set.csv'), reverse=True):
        density = 'breast_density' if path.stem.startswith('mass') else 'breast density'
        for r in table(path, 'patient_id', density, 'left or right breast', 'image view',
                       'abnormality type', 'assessment', 'pathology', 'image file path',
                       'ROI mask file path', 'cropped image file path'):
            r['density'] = r[density].replace('0', '')
            side, split = r['left or right breast'][:1], path.stem.split('_')[3]
            films[split, r['patient_id'], side, r['image view']].append(r)
    for file in listing(root):
        for folder in Path(file).parts[:-1]:
            files_in[folder].append(file)

    def files(place):
        name, _, series, *_ = f'{place}///'.split('/')
        return files_in.get(name) or files_in.get(series) or [f'{root}/{name}']

    progress = tqdm(films.items(), 'films', delay=2, disable=None)
    for (split, patient, side, view), lesions in progress:
        types = {r['abnormality type'] for r in lesions}
        malignant = any(r['pathology'] == 'MALIGNANT' for r in lesions)
        labels = dict(cancer=str(int(malignant)), lesion='1',
                      lesion_type='both' if len(types) == 2 else types.pop(),
                      birads=max(r['assessment'] for r in lesions),
                      density=max(r['density'] for r in lesions))
        path = files(lesions[0]['image file path'])[0]
        row = Row(path, patient, '', side, view, split, labels, record=lesions[0])
        rows.append(row)
        try:
            for r in lesions if boxes else ():
                row.shape = row.shape or shape(path)
                roi_files = {*files(r['ROI mask file path']), *files(r['cropped image file path'])}
                kind = 'cancer' if r['pathology'] == 'MALIGNANT' else 'benign'
                row.boxes.append((0, *roi_box(roi_files, row.shape[1:]), kind))
        except (ValueError, OSError) as problem:
            row.boxes, row.unplaced = [], f'{path} has no boxes: {problem}'
    return rows


def roi_box(files, film):
    """The box of the largest piece of an ROI mask, in pixels of a film (H, W). Mask and crop are swapped in
    part of the rows: the mask is the largest file with two values. One of another size is scaled."""
    masks = []
    for file in sorted(files):
        with contextlib.suppress(ValueError, OSError):      # a constant or damaged crop is no mask
            masks.append(read(file))
    masks = [roi for roi in masks if np.isin(roi, (0, 255)).all()]
    if not masks:
        raise ValueError(f'none of {len(files)} ROI files is a mask of two values')
    roi = max(masks, key=np.size)
    down, across = np.divide(film, roi.shape)
    if abs(down / across - 1) > 0.02:
        raise ValueError(f'an ROI mask of {roi.shape} pixels and a film of {film}, another aspect')
    pieces, _ = ndimage.label(roi)
    y, x = ndimage.find_objects(pieces)[np.bincount(pieces.ravel())[1:].argmax()]
    return x.start * across, y.start * down, x.stop * across, y.stop * down


CMMD_TWINS = ('D1-0202', 'D2-0284', 'D1-0808', 'D1-1292')   # the same pixels under two names


def cmmd(root, boxes, findings, notes):
    """CMMD: CMMD_clinicaldata_revision.xlsx, one row per breast, and DICOM below <ID1>/, whose headers give
    side and view. lesion: the breast has a row. The 1,458 images of breasts without one are negatives of
    cancer under --cancer_rule unlisted alone. CMMD_TWINS take no part."""
    lines = table(f'{root}/CMMD_clinicaldata_revision.xlsx', 'ID1', 'LeftRight', 'abnormality',
                  'classification')
    listed, rows, skipped = {(r['ID1'], r['LeftRight']): r for r in lines}, [], 0
    unlisted = Line.fromkeys(lines[0] if lines else (), '')
    for path in tqdm(listing(root), 'headers', delay=2, disable=None):
        patient = next((p for p in Path(path).parts if re.fullmatch(r'D[12]-\d{4}', p)), None)
        if patient in (None, *CMMD_TWINS):
            continue
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True,
                                     specific_tags=['ImageLaterality', 'ViewCodeSequence'])
            side, meaning = header.ImageLaterality, header.ViewCodeSequence[0].CodeMeaning
        except Exception:                                   # pydicom's words may quote the header
            skipped += 1
            continue
        r = listed.get((patient, side), unlisted)
        labels = dict(cancer=dict(Malignant='1', Benign='0').get(r['classification'], ''),
                      lesion=str(int((patient, side) in listed)), lesion_type=r['abnormality'])
        view = 'CC' if meaning.startswith('cranio') else 'MLO'
        rows.append(Row(path, patient, '', side, view, labels=labels, record=r))
    if skipped:
        notes.append(f'{skipped} files have no side or view in their header and take no part')
    return rows


def cesm(root, boxes, findings, notes):
    """CDD-CESM: 'Radiology manual annotations.xlsx', sheet 'all', and the low-energy JPEGs; one row per
    lesion. The worst counts, as in a BI-RADS of "4$5"; BI-RADS 6 (known cancer) is no label. The authors'
    own split is of images and mixes patients, so it is not used."""
    films, rows, verdict = defaultdict(list), [], 'Pathology Classification/ Follow up'
    path = max(Path(root).glob('Radiology?manual?annotations.*'),
               default=f'{root}/Radiology manual annotations.xlsx')
    for r in table(path, 'Image_name', 'Patient_ID', 'Side', 'Type', 'View', 'BIRADS',
                   'Breast density (ACR)', verdict, sheet='all'):
        if r['Type'] == 'DM':
            films[r['Image_name']].append(r)
    files = {Path(path).stem.strip(): path for path in listing(root)}
    for film, lesions in films.items():
        first, verdicts = lesions[0], {r[verdict] for r in lesions}
        grades = [grade.removesuffix('.0') for r in lesions for grade in r['BIRADS'].split('$')]
        labels = dict(cancer=str(int('Malignant' in verdicts)),
                      lesion=str(int(verdicts != {'Normal'})),
                      birads='' if '6' in grades else max(grades),
                      density=first['Breast density (ACR)'].upper().strip('_'))
        path = files.get(film, f'{root}/Low energy images of CDD-CESM/{film}.jpg')
        rows.append(Row(path, first['Patient_ID'].removesuffix('.0'), '', first['Side'],
                        first['View'], labels=labels, record=first))
    return rows


def mias(root, boxes, findings, notes):
    """mini-MIAS: Info.txt and mdb001 … mdb322, MLO films; mdb001 and mdb002 are one patient, odd is R.
    lesion: anything but NORM. A circle becomes a square; its y counts from the bottom of 1,024 pixels."""
    films, rows = defaultdict(list), []
    files = {Path(path).stem: path for path in listing(root)}
    circle = r'(?: +(\d{1,4}) +(\d{1,4}) +(\d{1,4})\b)?'
    for line in Path(root, 'Info.txt').read_text(errors='replace').splitlines():
        if match := re.match(r'(mdb\d{3}) +([FGD]) +(\w+)(?: +([BM])\b)?' + circle, line):
            films[match[1]].append(match.groups()[1:])
    for film, lesions in films.items():
        order, density, severity = int(film[3:]), lesions[0][0], lesions[0][2] or 'N'
        types = [kind for _, kind, *_ in lesions if kind != 'NORM']
        malignant = any(grade == 'M' for _, _, grade, *_ in lesions)
        labels = dict(cancer=str(int(malignant)), lesion=str(int(bool(types))), density=density,
                      lesion_type=types[0] if types else '')
        path, patient = files.get(film, f'{root}/{film}.pgm'), f'{(order + 1) // 2:03d}'
        row = Row(path, patient, '', 'LR'[order % 2], 'MLO', labels=labels,
                  record=dict(density=density, severity=severity))
        for _, kind, grade, x, y, radius in lesions:
            if x:
                x, y, radius = int(x), 1024 - int(y), int(radius)
                row.boxes.append((0, x - radius, y - radius, x + radius, y + radius,
                                  'cancer' if grade == 'M' else 'benign'))
            elif kind != 'NORM':
                row.unplaced = f'{film} has a lesion that Info.txt does not place'
        if boxes and row.boxes and os.path.isfile(path) and shape(path)[1:] != (1024, 1024):
            row.unplaced = f'{path} is not 1024x1024, for which Info.txt gives its circles'
        rows.append(row)
    return rows


def bcs(root, boxes, findings, notes):
    """BCS-DBT (Duke, DBTex): BCS-DBT-{labels,boxes,file-paths}-{train,validation,test}*.csv beside the DICOM
    tree. Actionable volumes, recalled but without a box, are no normals."""
    rows, names = {}, ('PatientID', 'StudyUID', 'View')
    key_of = itemgetter(*names)
    for split, part in dict(train='train', val='validation', test='test').items():
        # The longest name is the latest version.
        latest = [max(Path(root).glob(f'BCS-DBT-{kind}-{part}*.csv'), default=None,
                      key=lambda path: (len(path.stem), path))
                  for kind in ('labels', 'boxes', 'file-paths')]
        if None in latest:
            raise ValueError(f'{root}: BCS-DBT-labels, -boxes or -file-paths-{part}*.csv is absent')
        labels, lesions, paths = latest
        places = {key_of(r): (r['classic_path'], r['descriptive_path'])
                  for r in table(paths, *names, 'classic_path', 'descriptive_path')}
        for r in table(labels, *names, 'Normal', 'Cancer'):
            if key_of(r) not in places:
                raise ValueError(f'{labels}, line {r.number}: a volume that {paths.name} lacks')
            series = [Path(root, place) for place in places[key_of(r)]]     # a folder, or its file
            files = [file for place in series for file in (place, *sorted(place.glob('*.dcm')))]
            path = str(next(filter(Path.is_file, files), series[0]))
            rows[key_of(r)] = Row(path, r['PatientID'], r['StudyUID'], r['View'][:1].upper(),
                                  r['View'], split, dict(cancer=r['Cancer']),
                                  normal=number(r, 'Normal', labels) == 1, record=r, upside=True)
        for r in table(lesions, *names, 'Slice', 'X', 'Y', 'Width', 'Height', 'Class',
                       'VolumeSlices'):
            row = rows.get(key_of(r))
            if not row:
                raise ValueError(f'{lesions}, line {r.number}: a volume that {labels.name} lacks')
            x, y, w, h = (number(r, name, lesions) for name in ('X', 'Y', 'Width', 'Height'))
            z, K = (number(r, name, lesions, whole=True) for name in ('Slice', 'VolumeSlices'))
            row.boxes.append((z, x, y, x + w, y + h, r['Class']))
            row.record['VolumeSlices'] = K
    return list(rows.values())


# ---- lists of your own ---------------------------------------------------------------------------

EDGES = ('x0', 'y0', 'x1', 'y1')
SAME = ('path', 'volume', 'patient', 'exam', 'laterality', 'view', 'split', 'normal', 'upside',
        'years_to_cancer', 'years_followup', *TASKS)        # in all lines of an image


def own_list(root, boxes, findings, notes):
    """A CSV of your own, at --root or in it as manifest.csv or lesions.csv; a line per image, frame or box.

    path (from the CSV's folder) and patient (by default the volume, where the list has boxes); x0 y0 x1 y1
    of a box; frame: where the box lies, without a box the one that counts; a column named as the task, for
    risk years_to_cancer (blank: none seen) and years_followup; label: the kind of a box, without a box the
    label of tasks without a column. Optional: volume (a name, by default the path), exam, laterality, view,
    split, normal (0: no normal to train on), upside (1: may be stored upside down)."""
    path = Path(root)
    if path.is_dir():
        lists = [path / name for name in ('manifest.csv', 'lesions.csv') if (path / name).exists()]
        if not lists:
            raise ValueError(f'{path}: no manifest.csv or lesions.csv in it; give the list itself')
        path = lists[0]
    rows, splits, keys = {}, {}, {}
    for r in table(path, 'path'):
        row = own_row(path, r)
        first = rows.setdefault((os.path.realpath(row.path), row.frame), row)   # where a link leads
        split, named = splits.setdefault(row.patient, row.split), keys.setdefault(row.key, first)
        problem = contradiction(row, first, split, named)
        if problem:
            raise ValueError(f'{path}, line {r.number}: {problem}')
        if first is not row:
            first.boxes += row.boxes
    edges = [edge for row in rows.values() for box in row.boxes for edge in box[1:5]]
    if edges and 0 <= min(edges) and max(edges) <= 1:
        raise ValueError(f'{path}: all boxes lie within 0 … 1; expected pixels, no shares')
    return list(rows.values())


def own_row(path, r):
    """A line -> its Row, with the box if it has one."""
    volume = r['volume'] or os.path.normpath(r['path'])
    patient = r['patient'] or (volume if 'x0' in r else '')
    if not patient:
        raise ValueError(f'{path}, line {r.number}: no patient; expected one in every line')
    for column, allowed in dict(laterality='LR', normal='01', upside='01').items():
        if r[column] not in ('', *allowed):
            raise ValueError(f'{path}, line {r.number}: {column} is {r[column]!r}; expected '
                             f'{" or ".join(allowed)}, or blank')
    if any(re.fullmatch(r'\d+,\d+', r[column]) for column in ('label', *TASKS)):
        raise ValueError(f'{path}, line {r.number}: a label with a decimal comma; write a point')
    frame, boxes = number(r, 'frame', path, whole=True) if r['frame'] else None, []
    if any(r[edge] for edge in EDGES):
        x0, y0, x1, y1 = (number(r, edge, path) for edge in EDGES)
        boxes.append((frame or 0, x0, y0, x1, y1, r['label'] or 'lesion'))
        frame = None
    labels = {task: r.get(task, '' if boxes else r['label']) for task in TASKS[:-1]}
    if r['years_to_cancer'] or r['years_followup']:
        cancer = number(r, 'years_to_cancer', path) if r['years_to_cancer'] else math.inf
        followed = number(r, 'years_followup', path) if r['years_followup'] else cancer
        labels['risk'] = follow_up(cancer, followed)
    return Row(os.path.join(path.parent, r['path']), patient, r['exam'], r['laterality'], r['view'],
               r['split'], labels, boxes, normal=r['normal'] != '0', frame=frame, record=r,
               name=volume, upside=r['upside'] == '1')


def contradiction(row, first, split, named):
    """What is wrong with a row beside those above it, '' if nothing: `first` is the first row of its file,
    `split` that of its patient, `named` the first of its name in the challenge."""
    above = f'line {first.record.number}'
    if row.split != split:
        return f'patient {row.patient} is in split {row.split!r}, above in {split!r}'
    if 'x0' in row.record and named is not first:
        return 'patient, exam, laterality and view are those of another image'
    if first is row:
        return ''
    other = [column for column in SAME if row.record[column] != first.record[column]]
    if other:
        return f'the file of {above}, with another {", ".join(other)}'
    if not row.boxes or not first.boxes:
        return f'the file stands in {above} already'
    twice = row.boxes[0][:5] in [box[:5] for box in first.boxes]
    return 'this box is listed twice' if twice else ''


def follow_up(years_to_cancer, years_followup, years=5):
    """An exam -> its labels (T,) for the years 1 ... T: 1 cancer by the end of the year, 0 none, -1 unknown;
    None where no year is known or cancer came before the exam. years_to_cancer is infinite if none was seen.

    Only whole years of follow-up are known. After the year of a diagnosis all years are unknown, so that
    one cancer does not count in every later year."""
    cancer, year = years_to_cancer < years, np.arange(years)
    first = math.floor(years_to_cancer) if cancer else years
    last = first + 1 if cancer else math.floor(min(years_followup, years))
    return np.where(year >= last, -1, year >= first) if last > 0 and first >= 0 else None


DATASETS = dict(rsna=rsna, vindr=vindr, cbis=cbis, ddsm=cbis, cmmd=cmmd, cesm=cesm, mias=mias,
                bcs=bcs, csv=own_list)


# ---- label files ---------------------------------------------------------------------------------

class Line(dict):
    """A row of a table, column -> text; `number` is its line in the file."""
    number = 0

    def __missing__(self, column):      # a column that the file does not have is blank
        return ''


def table(path, *columns, sheet=None):
    """A CSV, or a sheet of an .xlsx (the first by default) -> list of `Line`s, where '' is blank.

    A CSV that was saved beside an .xlsx, under its name, is read instead. `columns` must be there, none may
    stand twice, and every row must have as many cells as the header."""
    path = Path(path)
    if path.suffix == '.xlsx' and path.with_suffix('.csv').exists():
        path = path.with_suffix('.csv')
    rows = sheet_rows(path, sheet) if path.suffix == '.xlsx' else csv_rows(path)
    rows = [(at, [text_of(cell) for cell in cells]) for at, cells in rows]
    (at, header), *rows = [(at, cells) for at, cells in rows if any(cells)] or [(1, [''])]
    missing = [name for name in columns if name not in header]
    twice = [name for name in header if name and header.count(name) > 1]
    if missing or twice:
        wrong = f'the column {twice[0]} twice' if twice else f'no column {", ".join(missing)}'
        present = ', '.join(filter(None, header)) or 'nothing'
        raise ValueError(f'{path}, line {at}: {wrong}; found {present}')
    lines = []
    for at, cells in rows:
        if len(cells) != len(header):
            raise ValueError(f'{path}, line {at}: {len(cells)} cells, expected {len(header)}; '
                             'is a comma or a quote wrong?')
        lines.append(Line((name, cell) for name, cell in zip(header, cells) if name))
        lines[-1].number = at
    return lines


def text_of(cell):
    """A cell without line breaks and the space around it; '' for a word that stands for a blank."""
    text = re.sub(r'[^\S ]+', ' ', cell).strip()
    return '' if text.lower() in ('nan', 'na', 'n/a', 'null', 'none') else text


def csv_rows(path):
    """A CSV in UTF-8 or UTF-16, with commas, semicolons or tabs -> [(line where a row begins, cells)]"""
    data, rows, at = path.read_bytes(), [], 1
    try:                                                    # a BOM says UTF-16; utf-8-sig drops its own
        text = data.decode('utf-16' if data[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig')
        comma = max(',;\t', key=text.split('\n', 1)[0].count)
        reader = csv.reader(io.StringIO(text, newline=''), delimiter=comma, strict=True)
        for cells in reader:
            rows.append((at, cells))
            at = reader.line_num + 1
    except (UnicodeDecodeError, csv.Error) as problem:
        raise ValueError(f'{path}, line {at}: {problem}; is it CSV in UTF-8, or is there a quote '
                         'too many?') from None
    commas = len(rows[0][1]) - 1 if rows else 0
    for at, cells in rows:
        # A quote that opens in one row and closes in another makes one cell of all between.
        if any('\n' in cell.strip() and cell.count(comma) >= commas > 0 for cell in cells):
            raise ValueError(f'{path}, line {at}: a cell holds whole rows; is a quote wrong?')
    return rows


def sheet_rows(path, name):
    """The sheet of that name, or the first, of an .xlsx -> [(number of the row, cells as text)]"""
    try:
        import openpyxl
        book = openpyxl.load_workbook(path, data_only=True)
    except ImportError:
        raise ValueError(f'{path}: pip install openpyxl, or save the sheet as CSV beside it, '
                         f'{path.stem}.csv') from None
    except Exception as problem:                            # a zip and its XML break in many ways
        raise ValueError(f'{path}: not a readable .xlsx ({problem}); save it again') from None
    sheet = next((s for s in book.worksheets if s.title.strip() == name), book.worksheets[0])
    rows = [['' if cell is None else str(cell) for cell in cells] for cells in sheet.values]
    return list(enumerate(rows, 1))


def number(line, name, path, whole=False):
    """A cell as a finite number; `whole`: as an integer."""
    with contextlib.suppress(ValueError):
        value = float(line[name])
        if math.isfinite(value) and not (whole and value % 1):
            return int(value) if whole else value
    expected = 'a whole number' if whole else 'a number'
    raise ValueError(f'{path}, line {line.number}: {name} is {line[name]!r}; expected {expected}')
