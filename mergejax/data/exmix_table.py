# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The 107 tasks of ExMix, as a table.

Source: Aribandi et al. (2022), "ExT5: Towards Extreme Multi-Task Scaling for
Transfer Learning", https://arxiv.org/abs/2111.10952.

No code or list of files was released. **What stands here is from memory of the
paper and must be compared with its appendix before it is quoted**: that there
are 107 tasks in eight families is what the paper says; the tasks marked `*` are
those of its study of transfer between families; the others are recalled, or
belong to the collections that it names (GLUE, SuperGLUE, GEM, KILT, Rainbow,
TweetEval, DialoGLUE, MRQA). `other` is for tasks of none of the eight families.
Numbers of training examples are those of the sets as they are published, in
TFDS where they are there, and may differ from the paper's; `-` is one that is
not known here. How rows become text is T5's for T5's tasks; for the others it
is ours.
"""

from collections.abc import Mapping
import dataclasses

# Name, set in TFDS, training examples, metric.
_ROWS = """
summarization
  aeslc                 aeslc                              14436 rouge
  arxiv                 scientific_papers/arxiv           203037 rouge
  big_patent            big_patent/all                   1207222 rouge
  billsum               billsum                            18949 rouge
  cnn_dailymail*        cnn_dailymail                     287113 rouge
  gigaword              gigaword                         3803957 rouge
  multi_news            multi_news                         44972 rouge
  newsroom              newsroom                          995041 rouge
  pubmed                scientific_papers/pubmed          119924 rouge
  reddit_tifu           reddit_tifu/long                   42139 rouge
  samsum                samsum                             14732 rouge
  wiki_lingua*          gem/wiki_lingua_english_en             - rouge
  wikihow               wikihow/all                            - rouge
  xsum*                 xsum                                   - rouge
dialogue
  banking77             -                                  10003 accuracy
  clinc150              clinc_oos                          15000 accuracy
  dialoglue_top*        -                                  31279 sequence
  dstc8_sgd             -                                      - f1
  empathetic_dialogues  -                                      - bleu
  hwu64                 -                                      - accuracy
  multiwoz              -                                      - f1
  mutual                -                                   7088 accuracy
  persona_chat          -                                      - bleu
  restaurant8k          -                                      - f1
  schema_guided*        gem/schema_guided_dialog          164982 bleu
  wizard_of_wikipedia*  -                                      - rouge
nli
  abductive_nli*        -                                 169654 accuracy
  anli_r1*              anli/r1                            16946 accuracy
  anli_r2*              anli/r2                            45460 accuracy
  anli_r3*              anli/r3                           100459 accuracy
  cb                    super_glue/cb                        250 accuracy
  fever                 -                                      - accuracy
  mnli*                 glue/mnli                         392702 accuracy
  qnli                  glue/qnli                         104743 accuracy
  rte                   glue/rte                            2490 accuracy
  scitail               sci_tail                           23097 accuracy
  snli                  snli                              550152 accuracy
  wnli                  glue/wnli                            635 accuracy
classification
  ag_news               ag_news_subset                    120000 accuracy
  civil_comments*       civil_comments/CivilComments     1804874 accuracy
  cola                  glue/cola                           8551 matthews
  goemotions*           goemotions                         43410 f1
  imdb*                 imdb_reviews/plain_text            25000 accuracy
  mrpc                  glue/mrpc                           3668 f1
  paws_wiki             paws_wiki/labeled_final_raw        49401 accuracy
  qqp                   glue/qqp                          363849 f1
  sst2                  glue/sst2                          67349 accuracy
  stsb                  glue/stsb                           5749 pearson
  trec                  trec                                5452 accuracy
  tweet_emotion         -                                   3257 accuracy
  tweet_hate            -                                   9000 accuracy
  tweet_irony           -                                   2862 accuracy
  tweet_offensive       -                                  11916 accuracy
  wic                   super_glue/wic                      5428 accuracy
  yelp_polarity         yelp_polarity_reviews             560000 accuracy
semantic_parsing
  atis_funql*           -                                      - sequence
  break_qdmr            -                                      - sequence
  cfq                   cfq/mcd1                           95743 sequence
  cogs*                 -                                  24155 sequence
  geo_funql*            -                                      - sequence
  mtop                  -                                      - sequence
  scan                  scan/simple                        16728 sequence
  spider                -                                   7000 sequence
  wikisql               -                                  56355 sequence
commonsense
  arc_challenge         ai2_arc/ARC-Challenge               1119 accuracy
  arc_easy              ai2_arc/ARC-Easy                    2251 accuracy
  codah                 -                                      - accuracy
  common_gen            gem/common_gen                     67389 rouge
  commonsense_qa        cos_e                               9741 accuracy
  copa                  super_glue/copa                      400 accuracy
  cosmos_qa             cosmos_qa                          25262 accuracy
  dpr                   definite_pronoun_resolution         1322 accuracy
  hellaswag             hellaswag                          39905 accuracy
  openbookqa            openbookqa                          4957 accuracy
  piqa*                 piqa                               16113 accuracy
  qasc                  qasc                                8134 accuracy
  social_iqa*           -                                  33410 accuracy
  story_cloze           story_cloze/2016                       - accuracy
  winogrande*           winogrande                         40398 accuracy
  wsc                   super_glue/wsc.fixed                 259 accuracy
closed_book_qa
  kilt_eli5             -                                      - rouge
  kilt_t_rex            -                                      - squad
  kilt_zero_shot_re     -                                      - squad
  natural_questions*    natural_questions_open             87925 squad
  trivia_qa*            trivia_qa/unfiltered.nocontext     87622 trivia_qa
  web_questions*        web_questions                       3778 squad
reading_comprehension
  boolq*                super_glue/boolq                    9427 accuracy
  coqa                  coqa                                7199 squad
  dream                 -                                   6116 accuracy
  drop                  drop                               77409 squad
  hotpot_qa             mrqa/hotpot_qa                         - squad
  multirc               super_glue/multirc                 27243 multirc
  narrative_qa          -                                      - rouge
  quac                  quac                               11567 squad
  race                  race/high                              - accuracy
  record                super_glue/record                 138854 record
  ropes                 -                                  10924 squad
  squad*                squad/v1.1                         87599 squad
  squad_v2              squad/v2.0                        130319 squad
  tweet_qa*             -                                  10692 bleu
  tydi_qa               tydi_qa/goldp                      49881 squad
other
  dart                  gem/dart                           62659 bleu
  e2e_nlg               gem/e2e_nlg                        33525 bleu
  totto                 gem/totto                         121153 bleu
  web_nlg               gem/web_nlg_en                     35426 bleu
  wiki_auto             gem/wiki_auto_asset_turk          483801 bleu
  wiki_bio              wiki_bio                          582659 bleu
"""

# How rows become text: `t5 TASK`; `summary ARTICLE SUMMARY` and `pair INPUTS
# TARGETS` name columns; `answers QUESTION ANSWERS` too, the second with a list;
# `label COLUMN,COLUMN NAME,NAME` has the names of the labels, or NLI's three.
# What is not here is not known.
_TEXTS = """
  aeslc            summary email_body subject_line
  arxiv            summary article abstract
  big_patent       summary description abstract
  billsum          summary text summary
  cnn_dailymail    t5 cnn_dailymail_v002
  gigaword         summary document summary
  multi_news       summary document summary
  newsroom         summary text summary
  pubmed           summary article abstract
  reddit_tifu      summary documents tldr
  samsum           summary dialogue summary
  wiki_lingua      summary source target
  wikihow          summary text headline
  xsum             summary document summary
  clinc150         pair text intent_name
  schema_guided    pair prompt target
  anli_r1          label context,hypothesis NLI
  anli_r2          label context,hypothesis NLI
  anli_r3          label context,hypothesis NLI
  cb               t5 super_glue_cb_v102
  mnli             t5 glue_mnli_v002
  qnli             t5 glue_qnli_v002
  rte              t5 glue_rte_v002
  scitail          label premise,hypothesis entailment,neutral
  snli             label premise,hypothesis NLI
  wnli             t5 glue_wnli_v002
  ag_news          label title,description World,Sports,Business,Science
  cola             t5 glue_cola_v002
  imdb             label text negative,positive
  mrpc             t5 glue_mrpc_v002
  paws_wiki        label sentence1,sentence2 different,paraphrase
  qqp              t5 glue_qqp_v002
  sst2             t5 glue_sst2_v002
  stsb             t5 glue_stsb_v002
  wic              t5 super_glue_wic_v102
  yelp_polarity    label text negative,positive
  cfq              pair question query
  scan             pair commands actions
  copa             t5 super_glue_copa_v102
  cosmos_qa        label context,question,answer0,answer1,answer2,answer3 0,1,2,3
  dpr              t5 dpr_v001_simple
  piqa             label goal,sol1,sol2 0,1
  qasc             pair formatted_question answerKey
  winogrande       label sentence,option1,option2 1,2
  wsc              t5 super_glue_wsc_v102_simple_train
  natural_questions answers question answer
  web_questions    answers question answers
  boolq            t5 super_glue_boolq_v102
  multirc          t5 super_glue_multirc_v102
  record           t5 super_glue_record_v102
  squad            t5 squad_v010_allanswers
  e2e_nlg          pair meaning_representation target
  wiki_auto        pair source target
"""


@dataclasses.dataclass(frozen=True)
class Row:
  """A task of ExMix.

  Attributes:
    name: of the task.
    family: of `FAMILIES`.
    tfds: its set in TFDS; None if TFDS has none.
    examples: for training, as published; None if that is not known here.
    metric: what it is measured by.
    text: how rows become text, see the module; None if that is not known here.
    in_study: whether it is in the paper's study of families.
  """

  name: str
  family: str
  tfds: str | None
  examples: int | None
  metric: str
  text: tuple[str, ...] | None
  in_study: bool

  @property
  def can_be_had(self) -> bool:
    """Whether this package makes a task of it, once TFDS has built its set."""
    return self.tfds is not None and self.text is not None


def _parsed(table, texts):
  pairs = (line.split(maxsplit=1) for line in texts.strip('\n').splitlines())
  text_of = {name: tuple(text.split()) for name, text in pairs}
  rows, family = {}, ''
  for line in table.strip('\n').splitlines():
    if not line.startswith(' '):
      family = line
      continue
    name, tfds, examples, metric = line.split()
    told = name.rstrip('*')
    rows[told] = Row(
      told, family, None if tfds == '-' else tfds,
      None if examples == '-' else int(examples), metric,
      text_of.pop(told, None), name.endswith('*'),
    )  # fmt: skip
  assert not text_of, text_of
  return rows


TASKS: Mapping[str, Row] = _parsed(_ROWS, _TEXTS)
FAMILIES = tuple(dict.fromkeys(row.family for row in TASKS.values()))
