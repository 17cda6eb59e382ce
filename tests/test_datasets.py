"""datasets.py: labels and boxes are those of the published layouts, a data set has one split for all uses, and what is
wrong with a label file is one sentence with its line."""
import math
import os
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import CASES, write
from PIL import Image
from test_images import dicom, item

import datasets
from datasets import Row, load, table


def film(path, pixels=((0, 1), (2, 3)), **elements):
    """(H, W) or (K, H, W) as a DICOM file of 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dicom(path, np.asarray(pixels, np.uint16), **elements)


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'')


def labels(rows, task):
    return [row.labels.get(task) for row in rows]


def refused(words, call, *args, **kwargs):
    """ValueError or OSError with these words, in one sentence."""
    with pytest.raises((ValueError, OSError)) as problem:
        call(*args, **kwargs)
    assert words in str(problem.value) and '\n' not in str(problem.value), problem.value


# ---- data sets as published ---------------------------------------------------------------------------------------

def test_rsna_copies_the_labels_of_a_breast_and_has_blanks(tmp_path):
    write(tmp_path / 'train.csv', [
        'site_id|patient_id|image_id|laterality|view|age|cancer|biopsy|BIRADS|implant|density',
        '2|10006|462822612|L|CC|61.0|0|0||0|', '1|10011|541722628|R|AT|55|1|1|0.0|0|C'])
    names = ['train_images/10006/462822612.dcm', 'train_images/10011/541722628.dcm']
    touch(*(tmp_path / name for name in names))
    rows, _ = load('rsna', tmp_path)
    assert [row.name for row in rows] == names and labels(rows, 'cancer') == ['0', '1']
    assert labels(rows, 'birads') == [None, '0'] and labels(rows, 'density') == [None, 'C']
    assert rows[1].view == 'AT' and rows[1].record['age'] == '55'


@pytest.fixture
def vindr(tmp_path):
    """Three images of two studies, one with two boxes."""
    write(tmp_path / 'breast-level_annotations.csv', [
        'study_id|series_id|image_id|laterality|view_position|height|width|breast_birads|breast_density|split',
        's1|q|i1|L|CC|50|40|BI-RADS 4|DENSITY C|training', 's1|q|i2|L|MLO|50|40|BI-RADS 4|DENSITY C|training',
        's2|q|i3|R|CC|50|40|BI-RADS 5|DENSITY B|test'])
    write(tmp_path / 'finding_annotations.csv', [
        'study_id|image_id|laterality|view_position|finding_categories|finding_birads|xmin|ymin|xmax|ymax|split',
        "s1|i1|L|CC|['Mass']|BI-RADS 4|1|2|9|9|training",
        "s1|i1|L|CC|['Skin Thickening', 'Mass']|BI-RADS 4|4.5|5|20.25|18|training",
        "s1|i2|L|MLO|['No Finding']||||||training"])
    for path in ('s1/i1', 's1/i2', 's2/i3'):
        film(tmp_path / f'images/{path}.dicom', np.zeros((50, 40)))
    return tmp_path


def test_vindr_has_no_cancer_label_and_its_boxes_count_under_any_of_their_categories(vindr):
    rows, _ = load('vindr', vindr)
    assert [(row.patient, row.split, row.name) for row in rows][::2] == [
        ('s1', 'train', 'images/s1/i1.dicom'), ('s2', 'test', 'images/s2/i3.dicom')]
    assert labels(rows, 'density') == ['C', 'C', 'B'] and labels(rows, 'birads') == ['4', '4', '5']
    assert labels(rows, 'lesion') == ['1', '0', '0'] and labels(rows, 'cancer') == [None] * 3
    assert labels(rows, 'lesion_type') == ['Skin Thickening', None, None]               # of the largest box
    assert labels(load('vindr', vindr, cancer_rule='birads5')[0], 'cancer') == ['0', '0', '1']
    assert labels(load('vindr', vindr, cancer_rule='birads45')[0], 'cancer') == ['1', '1', '1']
    rows, _ = load('vindr', vindr, boxes=True)
    boxes = [(0, 1, 2, 9, 9, 'Mass'), (0, 4.5, 5, 20.25, 18, 'Skin Thickening')]
    assert [row.boxes for row in rows] == [boxes, [], []] and rows[0].shape == (1, 50, 40)
    rows, _ = load('vindr', vindr, boxes=True, findings=('Mass',))
    assert [box[-1] for box in rows[0].boxes] == ['Mass', 'Mass']


def test_kinds_that_do_not_count_leave_their_images_out_of_the_normals(tmp_path):
    for name in 'abc':
        np.save(tmp_path / f'{name}.npy', np.zeros((8, 8), np.uint8))
    listed(tmp_path, BOX, 'a.npy,p,0,1,1,5,5,Mass,train', 'a.npy,p,0,2,1,5,5,Nipple,train',
           'b.npy,q,0,1,1,5,5,Nipple,train', 'c.npy,r,,,,,,,test')
    rows, _ = load('csv', tmp_path, boxes=True, findings=('Mass',))
    assert [(len(row.boxes), row.normal) for row in rows] == [(1, False), (0, False), (0, True)]
    refused('--findings Mas: expected some of Mass, Nipple', load, 'csv', tmp_path, boxes=True, findings=('Mas',))


CBIS = ('patient_id|{}|left or right breast|image view|abnormality id|abnormality type|assessment|pathology|'
        'image file path|cropped image file path|ROI mask file path')


def cbis_line(root, patient, set_name, number, kind, grade, verdict, roi, swapped=False, scale=1, density=3):
    """An abnormality, its film, and its mask and crop, under each other's column if swapped."""
    pixels = np.random.default_rng(0).integers(0, 4000, (60, 48))
    name = f'{set_name}_{patient}_LEFT_CC'
    home, place = root / 'CBIS-DDSM', name
    if set_name == 'Calc-Test':
        place = '1.3.6'                                     # found by its series UID, others by folder
    film(home / place / 'd' / '1-1.dcm', pixels)
    mask = np.zeros((60 // scale, 48 // scale))
    x0, y0, x1, y1 = (edge // scale for edge in roi)
    mask[y0:y1, x0:x1] = 65535
    mask[0, 0] = 65535                                      # a speck, which is no part of the lesion
    film(home / f'{name}_{number}' / 'd' / '1-1.dcm', mask)
    film(home / f'{name}_{number}' / 'd' / '1-2.dcm', pixels[:36, :36])
    places = [f'{name}_{number}/x/y/000000.dcm', f'{name}_{number}/x/z/000001.dcm\n'][::-1 if swapped else 1]
    about = (patient, density, 'LEFT', 'CC', number, kind, grade, verdict)
    return '|'.join(map(str, (*about, f'{name}/x/1.3.6/0.dcm', *places)))


@pytest.fixture
def cbis(tmp_path):
    """A film with two masses, one with a mass and a calcification, a patient in training and test."""
    mass, calc = CBIS.format('breast_density'), CBIS.format('breast density')
    write(tmp_path / 'mass_case_description_train_set.csv', [
        mass, cbis_line(tmp_path, 'P_1', 'Mass-Training', 1, 'mass', 3, 'BENIGN', (10, 12, 30, 40)),
        cbis_line(tmp_path, 'P_1', 'Mass-Training', 2, 'mass', 5, 'MALIGNANT', (4, 8, 20, 24), True, 2),
        cbis_line(tmp_path, 'P_2', 'Mass-Training', 1, 'mass', 4, 'BENIGN_WITHOUT_CALLBACK', (4, 8, 20, 24)),
        cbis_line(tmp_path, 'P_3', 'Mass-Training', 1, 'mass', 0, 'BENIGN', (4, 8, 20, 24), density=0)])
    write(tmp_path / 'calc_case_description_train_set.csv', [
        calc, cbis_line(tmp_path, 'P_2', 'Calc-Training', 1, 'calcification', 2, 'BENIGN', (1, 2, 9, 12))])
    write(tmp_path / 'calc_case_description_test_set.csv', [
        calc, cbis_line(tmp_path, 'P_3', 'Calc-Test', 1, 'calcification', 4, 'MALIGNANT', (6, 8, 20, 30), True)])
    return tmp_path


def test_cbis_has_a_row_per_lesion_and_two_spellings_of_density(cbis):
    rows = datasets.cbis(cbis, False, (), [])
    assert [row.split for row in rows] == ['train', 'train', 'train', 'test']
    assert labels(rows, 'cancer') == ['1', '0', '0', '1'] and labels(rows, 'birads') == ['5', '4', '0', '4']
    assert labels(rows, 'density') == ['3', '3', None, '3']
    assert labels(rows, 'lesion_type') == ['mass', 'both', 'mass', 'calcification']
    assert rows[0].path.endswith('CBIS-DDSM/Mass-Training_P_1_LEFT_CC/d/1-1.dcm') and rows[0].laterality == 'L'
    assert all(row.boxes == [] for row in rows)             # no mask is read unless boxes are wanted
    rows, notes = load('cbis', cbis)                        # a split that leaks keeps its test set
    assert [row.split for row in rows if row.patient == 'P_3'] == ['test'] and len(rows) == 3
    assert notes == ['1 patients are in two official splits; 1 images outside the test set take no part: P_3']


def test_cbis_boxes_are_those_of_the_masks_also_where_the_columns_are_swapped(cbis, monkeypatch):
    boxes = {row.patient: sorted(row.boxes) for row in load('ddsm', cbis, boxes=True)[0]}
    assert boxes == dict(P_1=[(0, 4, 8, 20, 24, 'cancer'), (0, 10, 12, 30, 40, 'benign')],
                         P_2=[(0, 1, 2, 9, 12, 'benign'), (0, 4, 8, 20, 24, 'benign')],
                         P_3=[(0, 6, 8, 20, 30, 'cancer')])
    monkeypatch.setattr(datasets, 'MAX_ABSENT', 0.5)
    film(cbis / 'CBIS-DDSM' / 'Mass-Training_P_1_LEFT_CC_1' / 'd' / '1-1.dcm',
         np.kron([[0, 1], [0, 0]], np.full((40, 20), 65535)))
    rows, notes = load('cbis', cbis, boxes=True)            # a film without a fitting mask takes no part
    assert {row.patient for row in rows} == {'P_2', 'P_3'} and 'another aspect' in notes[-1]
    assert {row.patient for row in load('cbis', cbis)[0]} == {'P_1', 'P_2', 'P_3'}


def test_cmmd_reads_sides_from_headers_and_labels_from_a_sheet(tmp_path):
    write(tmp_path / 'CMMD_clinicaldata_revision.csv', [
        'ID1|LeftRight|Age|number|abnormality|classification|subtype', 'D1-0001|R|44|2|calcification|Benign|',
        'D2-0007|L|51|2|both|Malignant|Luminal A', 'D1-0202|L|40|2|mass|Benign|'])
    for patient, side, view in (('D1-0001', 'R', 'cranio-caudal'), ('D1-0001', 'L', 'medio-lateral oblique'),
                                ('D2-0007', 'L', 'cranio-caudal'), ('D1-0202', 'L', 'cranio-caudal')):
        film(tmp_path / 'CMMD' / patient / f'{view}.dcm', ImageLaterality=side,
             ViewCodeSequence=[item(CodeMeaning=view)])
    film(tmp_path / 'CMMD' / 'D1-0003' / '1-1.dcm')
    rows, notes = load('cmmd', tmp_path)
    assert [(row.patient, row.laterality, row.view) for row in rows] == [
        ('D1-0001', 'R', 'CC'), ('D1-0001', 'L', 'MLO'), ('D2-0007', 'L', 'CC')]        # D1-0202 has a twin
    assert labels(rows, 'cancer') == ['0', None, '1'] and labels(rows, 'lesion') == ['1', '0', '1']
    assert labels(rows, 'lesion_type') == ['calcification', None, 'both'] and rows[1].record['Age'] == ''
    assert notes == ['1 files have no side or view in their header and take no part']
    assert labels(load('cmmd', tmp_path, cancer_rule='unlisted')[0], 'cancer') == ['0', '0', '1']
    refused('--cancer_rule birads5 --dataset cmmd: expected one of', load, 'cmmd', tmp_path, cancer_rule='birads5')


def test_cesm_has_spaces_in_names_several_rows_and_grades_in_one_cell(tmp_path):
    write(tmp_path / 'Radiology manual annotations.csv', [
        'Image_name|Patient_ID|Side|Type|Breast density (ACR)|BIRADS|View|Pathology Classification/ Follow up',
        'P1_L_DM_MLO |1.0|L|DM|C|4$5|MLO|Benign', 'P1_L_DM_MLO |1|L|DM|C|3.0|MLO|Malignant',
        'P1_L_CM_MLO|1|L|CESM|C|4|MLO|Malignant', 'P2_R_DM_CC|2|R|DM|b_|1|CC|Normal',
        'P3_R_DM_CC|3|R|DM|B|6|CC|Malignant'])
    folder = tmp_path / 'Low energy images of CDD-CESM'
    touch(folder / 'P1_L_DM_MLO.jpg', folder / 'P2_R_DM_CC .jpg', folder / 'P3_R_DM_CC.jpg')
    rows, _ = load('cesm', tmp_path)
    assert [os.path.basename(row.path) for row in rows][:2] == ['P1_L_DM_MLO.jpg', 'P2_R_DM_CC .jpg']
    assert labels(rows, 'cancer') == ['1', '0', '1'] and labels(rows, 'birads') == ['5', '1', None]
    assert labels(rows, 'lesion') == ['1', '0', '1'] and labels(rows, 'density') == ['C', 'B', 'B']
    assert [row.patient for row in rows] == ['1', '2', '3']


def test_mias_pairs_are_patients_and_circles_are_boxes_from_the_top(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, 'MAX_ABSENT', 0.5)
    (tmp_path / 'Info.txt').write_text('MAMMOGRAPHIC IMAGE ANALYSIS SOCIETY\n\nmdb001 G CIRC B 535 425 197\n'
                                       'mdb001 G CALC M 522 280 69\nmdb002 G NORM \nmdb003 D NORM\nmdb059 F ARCH B\n')
    for i in (1, 2, 3, 59):
        Image.fromarray(np.zeros((1024, 1024), np.uint8)).save(tmp_path / f'mdb{i:03d}.png')
    rows, _ = load('mias', tmp_path)
    assert [(row.patient, row.laterality) for row in rows] == [('001', 'R'), ('001', 'L'), ('002', 'R'), ('030', 'R')]
    assert labels(rows, 'cancer') == list('1000') and labels(rows, 'lesion') == list('1001')
    assert labels(rows, 'density') == list('GGDF') and labels(rows, 'lesion_type') == ['CIRC', None, None, 'ARCH']
    rows, notes = load('mias', tmp_path, boxes=True)
    assert rows[0].boxes == [(0, 338, 402, 732, 796, 'benign'), (0, 453, 675, 591, 813, 'cancer')]
    assert [row.patient for row in rows] == ['001', '001', '002'] and 'mdb059' in notes[0]      # has no place


@pytest.fixture
def bcs(tmp_path):
    """The three official splits in miniature."""
    for part, patient in (('train', 'DBT-P1'), ('validation', 'DBT-P2'), ('test', 'DBT-P3')):
        write(tmp_path / f'BCS-DBT-labels-{part}-v2.csv', [
            'PatientID|StudyUID|View|Normal|Actionable|Benign|Cancer', f'{patient}|S|lcc|0|0|0|1',
            f'{patient}|S|rmlo|1|0|0|0', f'{patient}|S|lmlo|0|1|0|0'])
        write(tmp_path / f'BCS-DBT-boxes-{part}-v2.csv', [
            'PatientID|StudyUID|View|Subject|Slice|X|Y|Width|Height|Class|AD|VolumeSlices',
            f'{patient}|S|lcc|x|2|8|20|10|12|cancer|0|4'])
        lines = ['PatientID|StudyUID|View|descriptive_path|classic_path']
        for view in ('lcc', 'rmlo', 'lmlo'):
            lines.append(f'{patient}|S|{view}|elsewhere/1-1.dcm|DBT/{patient}/{view}/')
            film(tmp_path / 'DBT' / patient / view / '1-1.dcm', np.zeros((4, 60, 40)))
        write(tmp_path / f'BCS-DBT-file-paths-{part}.csv', lines)
    return tmp_path


def test_bcs_dbt_is_read_as_published_and_the_latest_edition_of_a_csv_counts(bcs):
    rows, _ = load('bcs', bcs, boxes=True)
    assert [(row.view, row.laterality, row.normal, row.upside) for row in rows[:3]] == [
        ('lcc', 'L', False, True), ('rmlo', 'R', True, True), ('lmlo', 'L', False, True)]
    assert [row.split for row in rows[::3]] == ['train', 'val', 'test'] and rows[0].key == ('DBT-P1', 'S', 'lcc')
    assert rows[0].boxes == [(2, 8, 20, 18, 32, 'cancer')] and rows[0].shape == (4, 60, 40)
    assert labels(rows[:3], 'cancer') == ['1', '0', '0'] and rows[0].path.endswith('lcc/1-1.dcm')
    (bcs / 'BCS-DBT-labels-test-v2-PHASE-2-Jan-2024.csv').write_text(
        (bcs / 'BCS-DBT-labels-test-v2.csv').read_text().replace('lmlo,0,1', 'lmlo,1,0'))
    (bcs / 'BCS-DBT-boxes-train.csv').write_text((bcs / 'BCS-DBT-boxes-train-v2.csv').read_text().replace(',8,', ',9,'))
    rows, _ = load('bcs', bcs)
    assert rows[0].boxes[0][1] == 8 and [row.normal for row in rows] == [False, True, False] * 2 + [False, True, True]


def test_unusable_files_take_no_part_but_lesions_of_the_test_set_count_as_missed(bcs, monkeypatch):
    """A training volume is absent, a test volume has another depth than its boxes say."""
    monkeypatch.setattr(datasets, 'MAX_ABSENT', 0.3)
    (bcs / 'DBT' / 'DBT-P1' / 'lcc' / '1-1.dcm').unlink()
    path = bcs / 'BCS-DBT-boxes-test-v2.csv'
    path.write_text(path.read_text().replace(',0,4', ',0,60'))
    rows, notes = load('bcs', bcs, boxes=True)
    assert '2 of 9 files are absent or unusable' in notes[0] and 'count as missed' in notes[0]
    assert [(row.split, row.shape) for row in rows if row.boxes] == [('val', (4, 60, 40)), ('test', None)]
    assert len(rows) == len(load('bcs', bcs)[0]) == 8
    (bcs / 'DBT' / 'DBT-P3' / 'lcc' / '1-1.dcm').unlink()
    assert len(load('bcs', bcs, boxes=True)[0]) == 8 and len(load('bcs', bcs)[0]) == 7     # labels need a file


# ---- risk ---------------------------------------------------------------------------------------------------------

def test_follow_up_counts_whole_years_and_leaves_out_what_was_not_observed(tmp_path):
    z = np.load(CASES / 'hazard.npz')
    for cancer, followed, y, seen in zip(z['ytc'], z['ylf'], z['y'], z['mask']):
        assert datasets.follow_up(cancer, followed).tolist() == np.where(seen, y, -1).tolist()
    assert datasets.follow_up(1.7, 9).tolist() == [0, 1, -1, -1, -1]
    assert datasets.follow_up(math.inf, 3.9).tolist() == [0, 0, 0, -1, -1]
    assert datasets.follow_up(math.inf, 0.5) is None and datasets.follow_up(-1, 5) is None
    rows = listed(tmp_path, 'path,patient,years_to_cancer,years_followup', 'a,1,7.5,', 'b,2,NaN,2', 'c,3,,', 'd,4,1,9')
    assert [row.labels['risk'].tolist() if 'risk' in row.labels else None for row in rows] == [
        [0] * 5, [0, 0, -1, -1, -1], None, [0, 1, -1, -1, -1]]
    refused("line 2: years_to_cancer is '-inf'", listed, tmp_path, 'path,patient,years_to_cancer', 'a,1,-inf')


# ---- one strict table ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('text, words', [
    ('path,patient,age,birads\na,p,5,1\n\nb,p,5,3,4\n', 'line 4: 5 cells, expected 4'),
    ('path,patient,birads,birads\n', 'line 1: the column birads twice'),
    ('file,patient\n', 'line 1: no column path; found file, patient'),
    ('path,patient,age,birads\na,p,"5,1\nb,p,5,2\nc,p,5",3\n', 'line 2: a cell holds whole rows'),
    ('path,patient,age,birads\na,p,5,1\nb,p,5,"2\n', 'line 3: unexpected end of data; is it CSV in UTF-8'),
    ('path,patient,age,birads\nb,p,"5"0,2\n', "line 2: ',' expected after '\"'")])
def test_rows_that_would_shift_or_vanish_are_refused_with_their_line(tmp_path, text, words):
    (tmp_path / 'a.csv').write_text(text)
    refused(words, table, tmp_path / 'a.csv', 'path', 'patient')


@pytest.mark.parametrize('encoding, comma', [('utf-8', ','), ('utf-8-sig', ';'), ('utf-16', ','), ('utf-8', '\t')])
def test_what_spreadsheets_save_is_read(tmp_path, encoding, comma):
    text = 'path,patient,note\r\na  b.png,Zoë," two\nlines, one comma"\r\n,,\r\nc.png, p2 ,NaN\r\n'
    (tmp_path / 'a.csv').write_bytes(text.replace(',', comma).encode(encoding))
    first, second = table(tmp_path / 'a.csv', 'path', 'patient')
    assert first == dict(path='a  b.png', patient='Zoë', note=f'two lines{comma} one comma'.replace('\t', ' '))
    assert second == dict(path='c.png', patient='p2', note='') and (first.number, second.number) == (2, 5)
    (tmp_path / 'a.csv').write_bytes(text.encode('latin-1'))
    refused('is it CSV in UTF-8', table, tmp_path / 'a.csv')


def test_a_sheet_is_read_by_openpyxl_or_as_a_csv_beside_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'openpyxl', None)
    refused('a.xlsx: pip install openpyxl, or save the sheet as CSV beside it, a.csv', table, tmp_path / 'a.xlsx')
    write(tmp_path / 'a.csv', ['ID1|Age', 'D1-0001|44'])
    assert table(tmp_path / 'a.xlsx', 'ID1') == [dict(ID1='D1-0001', Age='44')]


# ---- lists of one's own -------------------------------------------------------------------------------------------

BOX = 'path,patient,frame,x0,y0,x1,y1,label,split'


def listed(folder, *lines):
    """The adapter alone: rows before splits, and before files are looked for."""
    (folder / 'manifest.csv').write_text('\n'.join(lines) + '\n')
    return datasets.own_list(folder, True, (), [])


def test_a_list_takes_a_column_per_task_or_the_column_label(tmp_path):
    rows = listed(tmp_path, 'path,patient,exam,laterality,view,split,frame,density,label,age',
                  'a.png,p1,e1,L,CC,train,,B,1.0,57', 'b.png,p2,e2,R,MLO,test,3,c,0,44')
    assert labels(rows, 'density') == ['B', 'c'] and labels(rows, 'cancer') == labels(rows, 'birads') == ['1', '0']
    assert [(r.exam, r.laterality, r.view, r.split, r.frame, r.record['age']) for r in rows] == [
        ('e1', 'L', 'CC', 'train', None, '57'), ('e2', 'R', 'MLO', 'test', 3, '44')]
    assert rows[1].key == ('p2', 'e2', 'RMLO') and pickle.loads(pickle.dumps(rows))[1].record.number == 3


def test_lines_of_one_image_are_one_row_with_several_boxes(tmp_path):
    rows = listed(tmp_path, BOX + ',exam,view,upside,laterality,volume,normal',
                  'v.npy,p,2,1,1,5,5,cancer,,s,lcc,1,L,one,', 'v.npy,p,7,2,2,6,6,,,s,lcc,1,L,one,',
                  'w.npy,,,,,,,,,t,MLO,,R,,0')
    assert rows[0].labels == {} and [row.normal for row in rows] == [True, False]
    assert [row.boxes for row in rows] == [[(2, 1, 1, 5, 5, 'cancer'), (7, 2, 2, 6, 6, 'lesion')], []]
    assert [row.patient for row in rows] == ['p', 'w.npy'] and rows[0].name == 'one' and rows[0].frame is None
    assert [row.key for row in rows] == [('p', 's', 'lcc'), ('w.npy', 't', 'RMLO')] and rows[0].upside


@pytest.mark.parametrize('head, lines, words', [
    ('path,patient,label', ['a,p,1', 'b,,1'], 'line 3: no patient'),
    ('path,patient,birads', ['a,p,3', 'b,q,"3,5"'], 'line 3: a label with a decimal comma'),
    ('path,patient,laterality', ['a,p,B'], "line 2: laterality is 'B'; expected L or R, or blank"),
    ('path,patient,split', ['a,p,train', 'b,p,test'], "line 3: patient p is in split 'test', above in 'train'"),
    ('path,patient,label', ['a,p,0', './x/../a,p,1'], 'line 3: the file of line 2, with another path'),
    ('path,patient,frame', ['a,p,1', 'a,p,2', 'a,p,1'], 'line 4: the file stands in line 2 already'),
    ('path,patient,frame', ['a,p,1.5'], "line 2: frame is '1.5'; expected a whole number"),
    (BOX, ['a,p,0,1,1,5,5,,', 'a,p,,,,,,,'], 'line 3: the file stands in line 2 already'),
    (BOX, ['a,p,0,1,1,5,5,,', 'a,q,0,2,2,5,5,,'], 'line 3: the file of line 2, with another patient'),
    (BOX, ['a,p,,1,1,5,5,m,', 'a,p,0,1,1,5,5,n,'], 'line 3: this box is listed twice'),
    (BOX + ',exam', ['a,p,,1,1,5,5,,,e', 'b,p,,1,1,5,5,,,e'], 'line 3: patient, exam, laterality and view are those'),
    (BOX, ['a,p,0,1,1,"9,5",5,,'], "line 2: x1 is '9,5'; expected a number"),
    (BOX, ['a,p,0,1,1,inf,5,,'], "line 2: x1 is 'inf'; expected a number"),
    (BOX, ['a,p,0,1,1,,5,,'], "line 2: x1 is ''; expected a number"),
    (BOX, ['a,p,0,.1,.2,.4,1,,', 'b,q,0,0,.2,.4,.5,,'], 'all boxes lie within 0 … 1; expected pixels')])
def test_lists_that_contradict_themselves_are_refused_with_the_line(tmp_path, head, lines, words):
    refused(words, listed, tmp_path, head, *lines)


def test_damaged_label_files_of_vindr_and_cmmd_are_refused_or_empty(tmp_path):
    write(tmp_path / 'finding_annotations.csv', ['image_id|finding_categories|xmin|ymin|xmax|ymax', 'i1|[]|1|2|9|9'])
    refused("line 2: a box of '[]'; expected", load, 'vindr', tmp_path)
    write(tmp_path / 'CMMD_clinicaldata_revision.csv', ['ID1|LeftRight|abnormality|classification'])
    film(tmp_path / 'D1-0001' / 'a.dcm', ImageLaterality='R', ViewCodeSequence=[item(CodeMeaning='cranio-caudal')])
    assert load('cmmd', tmp_path)[0][0].labels == dict(lesion='0')


def test_boxes_without_area_or_outside_their_image_are_refused(tmp_path):
    np.save(tmp_path / 'a.npy', np.zeros((4, 20, 30), np.uint8))
    for box in ('0,25,5,35,40', '3,5,5,10,9'):
        listed(tmp_path, BOX, f'a.npy,p,{box},,')
        assert load('csv', tmp_path, boxes=True)[0][0].shape == (4, 20, 30)
    for box in ('0,40,5,50,10', '0,5,-9,10,0', '0,10,5,10,9', '0,10,9,5,5', '4,5,5,10,9', '-1,5,5,10,9'):
        listed(tmp_path, BOX, f'a.npy,p,{box},,')
        refused('has no area or lies outside the file', load, 'csv', tmp_path, boxes=True)


# ---- splits -------------------------------------------------------------------------------------------------------

def test_all_tasks_and_both_scripts_share_one_split(tmp_path):
    lines = [f"{i}.npy,p{i // 2},{',,,' if i % 4 else '1,1,5,5'},{i % 3 % 2},{'abcd'[i % 4]}" for i in range(80)]
    for i in range(80):
        np.save(tmp_path / f'{i}.npy', np.zeros((8, 8), np.uint8))
    listed(tmp_path, 'path,patient,x0,y0,x1,y1,cancer,density', *lines)
    parts = [{row.name: row.split for row in load('csv', tmp_path, boxes=boxes)[0]} for boxes in (False, True)]
    os.remove(tmp_path / '3.npy')                           # an absent file moves nobody
    parts.append({'3.npy': parts[0]['3.npy']} | {row.name: row.split for row in load('csv', tmp_path)[0]})
    assert parts[0] == parts[1] == parts[2] and set(parts[0].values()) == {'train', 'val', 'test'}
    assert parts[0] != {row.name: row.split for row in load('csv', tmp_path, seed=1)[0]}


def test_splits_keep_patients_together_and_share_out_the_lesions():
    rows = [Row(f'{i}', f'p{i // 2}', boxes=[(0, 0, 0, 1, 1, '')] * (i % 4 == 0)) for i in range(80)]
    rows += [Row(f'c{i}', f'c{i}', labels=dict(cancer='1') if i % 2 else dict(risk=np.array([0, 1, -1, -1, -1])))
             for i in range(20)]
    backwards = datasets.assign([replace(row) for row in rows[::-1]], 0, [])
    rows = datasets.assign(rows, 0, [])
    assert {row.path: row.split for row in rows} == {row.path: row.split for row in backwards}
    parts = {split: {row.patient for row in rows if row.split == split} for split in ('train', 'val', 'test')}
    assert sum(map(len, parts.values())) == 60 and [len(parts[s]) for s in ('train', 'val', 'test')] == [39, 9, 12]
    ill = {row.patient for row in rows if row.boxes or row.labels}
    assert [len(parts[s] & ill) for s in ('train', 'val', 'test')] == [26, 6, 8]            # a fifth of 40, of 32
    refused("splits '', 'train': expected", datasets.assign, [Row('a', 'p'), Row('b', 'q', split='train')], 0, [])


def test_a_smaller_share_of_the_patients_lies_in_a_larger_one():
    patients = {f'p{i}': int(i % 5 == 0) for i in range(128)}
    small, large = (datasets.drawn(patients, share, 0, math.ceil) for share in (0.1, 0.5))
    assert small < large and len(small) == 11 + 3           # a tenth of 102 and of 26, rounded up
    assert small == datasets.drawn(dict(reversed(patients.items())), 0.1, 0, math.ceil)
    assert small != datasets.drawn(patients, 0.1, 1, math.ceil)


# ---- files --------------------------------------------------------------------------------------------------------

def test_absent_files_take_no_part_and_many_of_them_are_an_error(tmp_path):
    touch(*(tmp_path / f'{i}.png' for i in range(1, 40)))
    listed(tmp_path, 'path,patient,label', *(f'{i}.png,p{i},{i % 2}' for i in range(40)))
    rows, notes = load('csv', tmp_path)
    assert len(rows) == 39 and '1 of 40 files are absent' in notes[0] and '0.png: no such file' in notes[0]
    for i in (1, 2):
        os.remove(tmp_path / f'{i}.png')
    refused('are --root and --images the right folders?', load, 'csv', tmp_path)


def test_prepared_images_stand_in_for_published_ones(vindr, tmp_path_factory):
    prepared = tmp_path_factory.mktemp('prepared')
    for path in ('s1/i1', 's1/i2', 's2/i3'):
        touch(prepared / f'images/{path}.npy')
    rows, _ = load('vindr', vindr, images=prepared, boxes=True)
    assert rows[0].path == str(prepared / 'images/s1/i1.npy') and rows[0].file == f'{vindr}/images/s1/i1.dicom'
    assert rows[0].name == 'images/s1/i1.dicom' and rows[0].shape == (1, 50, 40)        # boxes are in its pixels
    touch(prepared / '1.2.840.npy')                         # of a file that has a UID for a name
    assert datasets.prepared('raw/1.2.840', 'raw', prepared) == str(prepared / '1.2.840.npy')
