"""The exercise in Korean; ``texts_en`` has the same keys with the same placeholders.

A particle never follows a placeholder directly, as its form would depend on what is filled in.
"""

from collections.abc import Mapping

TEXTS: Mapping[str, str] = {
    # --- the lesson ---------------------------------------------------------------------------
    "title": "병합할 가치가 있을까요? {model} 모델과 {adapter} 어댑터",
    "intro": (
        "어댑터는 베이스 모델 옆에 따로 두고 언제든 다른 어댑터로 갈아 끼울 수 있습니다. 또는 "
        "베이스의 가중치에 합쳐 넣어 하나의 모델로 만들 수도 있는데, 이것을 병합(fuse)이라고 "
        "합니다. 이 실습에서는 `{adapter}` 어댑터를 `{model}` 모델에 병합하고, 파인튜닝한 내용이 "
        "그대로 남아 있는지 확인한 다음, (a) 베이스+어댑터와 (b) 병합 모델의 시간을 각각 "
        "측정합니다. 마지막으로 여러분이 답할 질문은 하나입니다. 어댑터를 갈아 끼울 수 있다는 "
        "장점을 포기할 만큼 병합할 가치가 있을까요?"
    ),
    "step_fuse": "1단계(총 4단계): 병합하기",
    "merge_lora": (
        "어댑터가 붙은 레이어는 `W x + s B (A x)`를 계산합니다. W는 베이스에 저장된 가중치이고, "
        "A와 B는 학습된 얇은 행렬 두 개이며(여기서 랭크는 {rank}입니다), s는 고정된 "
        "배율입니다(여기서는 {scale}입니다). `s*B*A`는 W와 모양이 같으므로 둘을 미리 한 번만 더해 "
        "둘 수 있습니다. 즉, `W' = W + s*B*A`입니다. 그러면 추가 곱셈이 사라집니다. 대신 되돌릴 "
        "길도 사라집니다. W'만 가지고는 아무도 어댑터를 다시 떼어 낼 수 없습니다. 병합되는 레이어 "
        "수: {modules}."
    ),
    "merge_dora": (
        "어댑터가 붙은 레이어는 `W + s*B*A`로 계산합니다. W는 베이스에 저장된 가중치이고, A와 B는 "
        "학습된 얇은 행렬 두 개이며(여기서 랭크는 {rank}입니다), s는 고정된 배율입니다(여기서는 "
        "{scale}입니다). DoRA는 여기에 더해, 합의 각 행을 따로 학습된 길이에 맞춥니다. 이 모든 "
        "것을 미리 한 번만 계산해 하나의 행렬 W'로 저장할 수 있습니다. 그러면 추가 계산이 "
        "사라집니다. 대신 되돌릴 길도 사라집니다. W'만 가지고는 아무도 어댑터를 다시 떼어 낼 수 "
        "없습니다. 병합되는 레이어 수: {modules}."
    ),
    "merge_full": (
        "이 파인튜닝은 LoRA의 얇은 행렬(`W + s*B*A`)이 아니라 가중치 전체를 담고 있습니다. "
        "병합하면 베이스의 가중치 자리에 이 가중치가 들어갑니다. 병합 모델만 가지고는 아무도 이를 "
        "다시 떼어 낼 수 없습니다. 병합되는 레이어 수: {modules}."
    ),
    "rounding": (
        "베이스는 양자화되어 있습니다({formats}). 작은 묶음 안에서 가중치는 정해진 몇 개의 눈금 "
        "값만 가질 수 있고, 4비트라면 눈금은 16개입니다. 그런데 더한 결과는 눈금과 눈금 사이에 "
        "놓이므로 다시 눈금으로 옮겨야 합니다. `mlx_lm.fuse`는 가중치마다 가장 가까운 눈금으로 "
        "반올림합니다. 하지만 어댑터가 더하는 값은 눈금 한 칸보다 작을 때가 많아서, 배운 것의 상당 "
        "부분이 반올림으로 사라질 수 있습니다. `mlx-fusekit fuse`는 먼저 베이스+어댑터에 텍스트를 "
        "통과시켜 보고, 각 레이어의 출력이 가장 적게 변하도록 눈금을 고릅니다. 크기는 그대로입니다."
    ),
    "no_rounding": (
        "베이스가 양자화되어 있지 않으므로 더한 결과를 거의 그대로 저장할 수 있습니다. 숫자의 "
        "마지막 자리만 반올림됩니다."
    ),
    "fused_by": "{name}: {seconds}, {size}",
    "peer_failed": (
        "mlx_lm.fuse로는 이 모델을 병합할 수 없어서 빼고 진행합니다. 출력된 메시지: {line}"
    ),
    "peer_ignores_nothing": (
        "mlx_lm.fuse에는 --ignore가 없어 어댑터 전체를 병합하게 되므로 빼고 진행합니다."
    ),
    "step_parity": "2단계(총 4단계): 파인튜닝한 내용이 남아 있을까요?",
    "parity_explained": (
        "병합 모델을 디스크에서 다시 읽어, 같은 토큰 {tokens}개({data})에 대해 베이스+어댑터와 "
        "나란히 실행합니다. KL은 다음 토큰의 확률이 베이스+어댑터의 확률과 얼마나 먼지를 나타내며, "
        "0이면 똑같습니다. 최상위 토큰 일치율(top-1)은 두 모델이 1순위로 꼽은 다음 토큰이 서로 "
        "같은 비율입니다. 완전 일치율은 정답의 모든 토큰을 모델이 1순위로 꼽은 비율입니다."
    ),
    "data_generated": "베이스+어댑터가 쓴 텍스트",
    "parity_table": "베이스+어댑터와 얼마나 가까울까요?",
    "column_kl": "KL",
    "column_top1": "top-1",
    "column_exact": "완전 일치율",
    "row_dropped": "베이스(어댑터 없음)",
    "parity_both": (
        "베이스+어댑터와의 KL은 토큰당 `mlx-fusekit fuse`가 {calibrated} nat, `mlx_lm.fuse`가 "
        "{rounded} nat이고, 어댑터를 아예 빼면 {base} nat입니다."
    ),
    "parity_ours": (
        "베이스+어댑터와의 KL은 토큰당 `mlx-fusekit fuse`가 {calibrated} nat이고, 어댑터를 아예 "
        "빼면 {base} nat입니다."
    ),
    "parity_depends": (
        "반올림으로 얼마나 잃는지는 어댑터에 따라 다릅니다. 어댑터가 더하는 값이 눈금 한 칸에 비해 "
        "작을수록 더 많이 잃습니다. 그 크기는 `mlx-fusekit inspect ADAPTER --model BASE` 명령으로 "
        "볼 수 있습니다."
    ),
    "step_timing": "3단계(총 4단계): (a) 베이스+어댑터와 (b) 병합 모델의 시간 측정하기",
    "timing_explained": (
        "모든 모델이 {prompt}토큰짜리 같은 프롬프트를 받아 {generated}토큰을 생성합니다. 워밍업을 "
        "한 번 한 뒤, 발열이나 다른 프로그램의 영향이 고르게 나뉘도록 순서를 맞추어 번갈아 "
        "{trials}번씩 실행합니다. 표의 값은 중앙값으로, 첫 토큰이 나올 때까지의 시간과 그 뒤 토큰 "
        "하나에 걸리는 시간입니다."
    ),
    "timing_table": "얼마나 빠를까요?",
    "column_first": "첫 토큰",
    "column_per_token": "토큰당",
    "column_rate": "토큰/초",
    "row_base": "베이스",
    "row_adapted": "(a) 베이스+어댑터",
    "row_fused": "(b) 병합 모델",
    "interval_explained": (
        "(b)가 몇 배 빠른지는 95% 신뢰구간과 함께 나타냅니다. 구간 안에 1이 들어 있으면 차이가 "
        "있다고 말할 수 없다는 뜻입니다. 회마다 둘을 잇달아 재며, 배수는 회별 비율의 중앙값이므로 "
        "위 표에 있는 중앙값끼리의 비율과 다를 수 있습니다."
    ),
    "speed_faster": (
        "병합 모델이 더 빠릅니다. 토큰당 속도가 베이스+어댑터의 {ratio}배입니다(95% 신뢰구간 "
        "{low}~{high}, {trials}회)."
    ),
    "speed_slower": (
        "병합 모델이 더 느립니다. 토큰당 속도가 베이스+어댑터의 {ratio}배입니다(95% 신뢰구간 "
        "{low}~{high}, {trials}회)."
    ),
    "speed_no_difference": (
        "차이가 있다고 말할 수 없습니다. 병합 모델의 토큰당 속도는 베이스+어댑터의 {ratio}배인데, "
        "95% 신뢰구간({low}~{high}, {trials}회) 안에 1이 들어 있기 때문입니다."
    ),
    "speed_too_few": (
        "시행 횟수가 적어 판단할 수 없습니다. {trials}회 실행에서 병합 모델의 토큰당 속도는 "
        "베이스+어댑터의 약 {ratio}배였지만, 판단하려면 적어도 {fewest}회가 필요합니다(`-n`)."
    ),
    "step_cost": "4단계(총 4단계): 비용 따져 보기",
    "cost_explained": (
        "메모리에 올린 베이스 하나로 여러 어댑터를 쓸 수 있습니다. 병합하면 파인튜닝마다 디스크와 "
        "메모리에서 온전한 모델 하나를 차지합니다. 여러분이 쓴다고 한 어댑터의 수: "
        "{adapters}(`--adapters`)."
    ),
    "cost_table": "비용은 얼마나 들까요?",
    "column_swappable": "교체 가능",
    "column_fused": "병합",
    "cost_disk_one": "디스크, 어댑터 1개",
    "cost_disk_many": "디스크, 어댑터 {adapters}개",
    "cost_each": "디스크, 어댑터 1개 추가",
    "cost_load": "다른 것 불러오기",
    "cost_make": "하나 만들기",
    "cost_memory": "최대 메모리",
    "step_answer": "이제 여러분 차례입니다",
    "question": (
        "어댑터를 갈아 끼울 수 있다는 장점을 포기할 만큼 병합할 가치가 있습니까? 두 문장으로 답해 "
        "보세요. 이 컴퓨터에서 병합하면 무엇을 얻고, 여러분이 쓰는 어댑터 수를 생각할 때 무엇을 "
        "잃습니까?"
    ),
    "no_plots": "그림을 그리려면 matplotlib가 필요합니다(pip install 'mlx-fusekit[plot]').",
    "written": "보고서: {path}",
    "next": "보고서에 두 문장을 써넣은 다음, 빠진 것이 없는지 확인해 보세요.",
    "took": "전체 소요 시간: {seconds}",
    "warning": "주의",
    "caution_busy": (
        "측정을 시작할 때 다른 프로그램 때문에 컴퓨터가 바빴습니다(부하 {load}). 그만큼 시간이 덜 "
        "확실합니다."
    ),
    "caution_drift": (
        "측정하는 동안 속도가 {share}만큼 변했습니다. 실행 순서로 균형을 맞추기는 하지만, 컴퓨터가 "
        "한가할 때 재면 구간이 더 좁아집니다."
    ),
    "caution_unsteady": "다음은 실행할 때마다 같은 글을 쓰지는 않았습니다: {arms}.",
    # --- the report ---------------------------------------------------------------------------
    "report_intro": (
        "`mlx-fusekit exercise`를 컴퓨터 한 대에서 한 번 실행하여 작성한 보고서입니다. 모든 수치는 "
        "같은 폴더의 `report.json`에 들어 있습니다."
    ),
    "heading_fuse": "1. 병합하기",
    "heading_parity": "2. 파인튜닝한 내용이 남아 있을까요?",
    "heading_timing": "3. (a) 베이스+어댑터와 (b) 병합 모델의 시간 측정하기",
    "heading_cost": "4. 비용 따져 보기",
    "heading_answer": "5. 나의 답",
    "heading_run": "실행 정보",
    "column_command": "명령",
    "column_time": "시간",
    "column_size": "크기",
    "column_model": "모델",
    "caption_parity": (
        "각 모델이 베이스+어댑터에서 얼마나 먼지를 로그 축에 나타낸 그림입니다. 눈금 한 칸만큼 "
        "왼쪽에 있으면 열 배 더 가깝습니다."
    ),
    "caption_timing": (
        "왼쪽: 시행마다 토큰 하나에 걸린 시간이며, 막대는 중앙값입니다. 오른쪽: 생성하는 동안 각 "
        "토큰이 나오기까지 걸린 시간이며, 음영은 시행의 가운데 80%입니다."
    ),
    "answer_here": "(이 줄을 지우고 여기에 두 문장을 써 보세요.)",
    "answer_keep": (
        "답의 위아래에 있는 두 줄은 그대로 두세요. `--check`는 그 사이에 있는 글을 확인합니다."
    ),
    "model_answer": "여러분의 측정값으로 쓴 모범 답안(먼저 직접 써 보세요)",
    "answer_break_even": (
        "1,000토큰마다 {saved}씩 절약되고 병합에는 {fuse} 걸렸으므로, 어댑터 하나가 약 "
        "{tokens}토큰을 생성해야 병합에 들인 시간을 되찾습니다."
    ),
    "answer_unclear_break_even": (
        "몇 토큰을 생성해야 병합에 들인 시간을 되찾는지는 알 수 없습니다. 그러기에는 중앙값의 "
        "차이가 너무 작습니다."
    ),
    "answer_disk_one": (
        "디스크에서 베이스와 어댑터는 {swappable}, 병합 모델은 {separate}의 공간을 차지합니다. "
        "어댑터가 하나 늘 때마다 교체 방식은 {adapter}, 병합 방식은 {fused}의 공간이 더 듭니다."
    ),
    "answer_disk_many": (
        "디스크에서 어댑터 {adapters}개는 베이스 하나와 함께 두면 {swappable}, 각각 병합하면 "
        "{separate}의 공간을 차지합니다. 어댑터가 하나 늘 때마다 교체 방식은 {adapter}, 병합 "
        "방식은 {fused}의 공간이 더 듭니다."
    ),
    "decide_fuse_one": (
        "어댑터가 하나뿐이라면 갈아 끼울 일이 없으므로, 그보다 많은 토큰을 생성할 예정이라면 "
        "병합하고, 되돌릴 수 있도록 어댑터 파일은 따로 보관하겠습니다."
    ),
    "decide_fuse_many": (
        "그래서 그보다 많은 토큰을 생성하고 거의 늘 사용하는 어댑터만 병합하고, 나머지는 베이스 "
        "하나에 갈아 끼울 수 있게 그대로 두겠습니다."
    ),
    "decide_keep_one": (
        "따라서 여기서는 속도 때문에 병합할 이유가 없습니다. 어댑터를 그대로 두고, 어댑터를 불러올 "
        "수 없는 환경에 배포할 때만 병합하겠습니다."
    ),
    "decide_keep_many": (
        "따라서 여기서는 속도 때문에 교체 가능성을 포기할 이유가 없습니다. 어댑터들을 베이스 "
        "하나와 함께 그대로 두고, 어댑터를 불러올 수 없는 환경에 배포할 때만 병합하겠습니다."
    ),
    "decide_later": (
        "따라서 아직은 결정하지 않고, 어댑터를 갈아 끼울 수 있게 그대로 둔 채 시행 횟수를 늘려 "
        "다시 측정하겠습니다."
    ),
    "run_what": "항목",
    "run_value": "값",
    "run_machine": "컴퓨터",
    "run_system": "운영체제",
    "run_device": "MLX 실행 장치",
    "run_versions": "버전",
    "run_settings": "설정",
    "run_data": "비교에 쓴 텍스트",
    "run_fingerprint": "컴퓨터 지문",
    "run_caution": "주의",
    "machine": "{chip}, 코어 {cores}개, {memory}",
    # --- the check ----------------------------------------------------------------------------
    "check_complete": "{name}: 빠진 것이 없습니다.",
    "check_incomplete": "{name}: 아직 빠진 것이 있습니다.",
    "missing_json": (
        "같은 폴더에 report.json이 없습니다. 다시 가져다 놓거나 실습을 다시 실행해 주세요"
    ),
    "damaged_json": (
        "같은 폴더의 report.json이 손상되었거나 이 실습의 파일이 아닙니다. 실습을 다시 실행해 "
        "주세요"
    ),
    "other_json": (
        "같은 폴더의 report.json은 이 보고서를 작성할 때 쓴 파일이 아닙니다. 원래 파일을 가져다 "
        "놓거나 실습을 다시 실행해 주세요"
    ),
    "other_machine": (
        "다른 컴퓨터에서 측정한 보고서입니다(지문 {theirs}, 이 컴퓨터는 {ours}). 이 컴퓨터에서 "
        "실습을 실행하거나 --any-machine을 붙여 확인해 주세요"
    ),
    "figure_missing": "3번 표에 {arm} 측정값이 없습니다",
    "figure_differs": (
        "{arm} 측정값이 report.json과 다릅니다. 3번 표에는 {found} 값이 있는데, 실제 값은 "
        "{expected}입니다"
    ),
    "answer_place_missing": (
        "답을 쓰는 자리가 없어졌습니다. {start} 줄과 {end} 줄 사이에 답을 써 주세요"
    ),
    "answer_missing": "아직 답이 없습니다. {start} 줄과 {end} 줄 사이에 두 문장을 써 주세요",
    "answer_short": "문장이 적어도 두 개 필요합니다. 지금 있는 문장의 수: {count}",
    "answer_off_topic": (
        "답이 아직 장단점을 다루지 않습니다. 병합으로 무엇을 얻는지(예: 속도) 또는 무엇을 "
        "잃는지(어댑터 교체, 디스크, 메모리) 써 주세요"
    ),
    # --- what takes long ----------------------------------------------------------------------
    "step: generating text": "텍스트 생성",
    "step: re-quantizing": "다시 양자화",
    "step: measuring": "측정",
    "step: writing": "저장",
    "step: comparing": "비교",
    "step: comparing files": "파일 비교",
    "step: warming up": "워밍업",
    "step: timing": "시간 측정",
    "step: loading": "불러오기",
}
