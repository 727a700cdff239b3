import { app } from "../../scripts/app.js";

const ENGLISH = {
  idle: "Run the workflow and watch the prompt grow here, word by word.",
  idleScore: "Run the workflow to see the contribution of each word.",
  missing: "Connect {names} first.",
  starting: "Getting ready…",
  running: "Step {step} of {steps}",
  loadingWords: "Loading the language model…",
  reading: "Reading the words…",
  left: "{time} left",
  leftOfPart: "{time} left of this part",
  finishing: "Finishing…",
  done: "Learned",
  scored: "Scored",
  finished: "Finished early",
  kept: "Kept",
  stored: "Learned before",
  cancelled: "Cancelled · the best so far",
  failed: "Failed · the best so far",
  error: "Failed",
  several: "{count} prompts",
  mean: "mean",
  changed: "Learned with other settings: {names}",
  candidates: "{count} candidates",
  history: "{count} prompts so far",
  pick: "Click to use this prompt and keep it",
  more: "(and {count} more)",
  keep: "Keep this",
  keepHint: "Store the best prompt so far and use it",
  copy: "Copy",
  copyAll: "Copy all",
  copied: "Copied",
  notCopied: "Cannot copy",
  finish: "Finish now",
  finishHint: "End the search and go on with the best prompt so far",
  similarity: "Cosine similarity with the target, by CLIP",
  blockedHint: "Struck words are blocked in the next run",
  blockedWhileKept: "Struck words are blocked in the next search",
  adds: "adds {value}",
  takes: "takes {value} away",
  block: "Click to block it in the next run",
  unblock: "Click to allow it again",
  curve: "Similarity over the steps, now {value}",
  progress: "Progress of the search",
  separator: ", ",
  live: "live view",
};

const CHINESE = {
  idle: "运行工作流，提示词会在这里逐词显现。",
  idleScore: "运行工作流，查看提示词中每个词的贡献。",
  missing: "请先连接 {names}。",
  starting: "准备中…",
  running: "第 {step} / {steps} 步",
  loadingWords: "正在加载语言模型…",
  reading: "正在读取词汇…",
  left: "剩余 {time}",
  leftOfPart: "本阶段剩余 {time}",
  finishing: "正在收尾…",
  done: "学习完成",
  scored: "评分完成",
  finished: "提前结束",
  kept: "已保留",
  stored: "此前学得",
  cancelled: "已取消 · 目前最佳",
  failed: "出错 · 目前最佳",
  error: "出错",
  several: "{count} 条提示词",
  mean: "平均",
  changed: "学习时的设置不同：{names}",
  candidates: "{count} 个候选",
  history: "至今 {count} 条提示词",
  pick: "点击使用并保留这条提示词",
  more: "（另有 {count} 条）",
  keep: "保留这条",
  keepHint: "保存并使用目前最佳的提示词",
  copy: "复制",
  copyAll: "全部复制",
  copied: "已复制",
  notCopied: "无法复制",
  finish: "立即结束",
  finishHint: "结束搜索，采用目前最佳的提示词",
  similarity: "CLIP 计算的与目标的余弦相似度",
  blockedHint: "划掉的词在下次运行时会被屏蔽",
  blockedWhileKept: "下次搜索时会屏蔽划掉的词",
  adds: "贡献 +{value}",
  takes: "降低 {value}",
  block: "点击后在下次运行时屏蔽",
  unblock: "点击后重新允许",
  curve: "相似度随步数的变化，当前 {value}",
  progress: "搜索进度",
  separator: "、",
  live: "实时视图",
};

/** Labels and placeholders of the schemas, which the page itself does not translate. */
const CHINESE_WIDGETS = {
  "prompt: kept": "提示词：已保留",
  "prompt: new": "提示词：新",
  "one prompt for all images": "所有图像共用一个",
  "one prompt per image": "每张图像一个",
  "style and content": "风格和内容",
  "style alone": "仅风格",
  "always learn": "总是学习",
  "join if it fits": "放得下就拼接",
  "your caption (optional)": "固定文本（可选）",
  "negative prompt (optional)": "负面提示词（可选）",
  "things to avoid, one per line": "要避开的内容，每行一个",
  "subjects, one per line": "主体，每行一个",
  "contents of the images": "图像的内容",
  "long prompt": "长提示词",
  "a prompt": "提示词",
  "or texts to compare with, one per line": "或要比较的文本，每行一个",
  "all words": "所有词",
  "blocked words": "屏蔽词",
};

const place = (section) => (section ? `第 ${section} 段` : "提示词");

const CHINESE_WORDINGS = { tags: "标签", sentence: "句子" };

/** Notes of the server about single prompts, of which one text may hold several. */
const CHINESE_NOTES = [
  [/^There was no text\./, () => "没有文本。"],
  [/^without words that do not help:/, () => "去掉无用的词："],
  [/Finished before its turn; a first guess\./, () => "尚未轮到就已结束，这只是初步结果。"],
  [
    /(?:Section (\d+)|The prompt) is short enough already and is unchanged\./g,
    (_, section) => `${place(section)}已经够短，未作改动。`,
  ],
  [
    /(?:Section (\d+)|The prompt) was not reached and is unchanged\./g,
    (_, section) => `${place(section)}尚未处理，未作改动。`,
  ],
  [
    /(?:Section (\d+)|The prompt) keeps its weighted words, which fill a context\./g,
    (_, section) => `${place(section)}保留带权重的词，它们已占满一个上下文。`,
  ],
  [
    /(?:Section (\d+)|The prompt) was shortened further, to the size of one context: (\d+) learned tokens, not (\d+)\./g,
    (_, section, learned, wanted) =>
      `${place(section)}被进一步缩短到一个上下文的长度：学习 ${learned} 个 token，而不是 ${wanted} 个。`,
  ],
  [
    /The caption was cut from (\d+) to (\d+) tokens: the context of the CLIP has (\d+), and (\d+) are learned\./,
    (_, before, after, size, learned) =>
      `固定文本从 ${before} 个 token 截短到 ${after} 个：CLIP 的上下文有 ${size} 个，其中 ${learned} 个用于学习。`,
  ],
  [/Left out: (".*?")\./, (_, words) => `去掉的部分：${words}。`],
  [
    /Dropped, since they lower the similarity: (".*?")\./,
    (_, words) => `去掉了降低相似度的词：${words}。`,
  ],
  [/The caption holds no description, so the prompt has none\./, "固定文本没有描述图像，因此提示词没有固定文本。"],
  [
    /Beside the caption there is room for (\d+) learned tokens, not for (\d+)\./,
    (_, room, wanted) => `固定文本旁边只有学习 ${room} 个 token 的位置，而不是 ${wanted} 个。`,
  ],
  [
    /The caption is a list of tags, so the learned words are tags, too\./,
    "固定文本是标签列表，因此学到的词也是标签。",
  ],
  [
    /Without effect: `wording` (tags|sentence), since (.*?); the prompt is free\./,
    (_, wording, cause) =>
      `措辞 ${CHINESE_WORDINGS[wording]}不起作用，因为${
        cause.includes("effort") ? "搜索力度是论文算法" : "这个 CLIP 的分词器不同"
      }；提示词是任意的词。`,
  ],
  [
    /Without effect: (.*?), since `wording` is (tags|sentence)\./,
    (_, names, wording) =>
      `措辞为${CHINESE_WORDINGS[wording]}时，${names
        .replace("`lr`", "学习率")
        .replace("`weight_decay`", "权重衰减")
        .replace(" and ", "和")}不起作用。`,
  ],
  [
    /Without effect: (.*?), since the prompt was written in place of Algorithm 1, and all phrases of the vocabulary are single tokens\./,
    (_, names) =>
      `提示词由语言模型写成，而词表中的短语都是单个 token，因此${names
        .replace("`steps`", "步数")
        .replace("`lr`", "学习率")
        .replace("`weight_decay`", "权重衰减")
        .replaceAll(" and ", "和")}不起作用。`,
  ],
  [
    /^The join has (\d+) tokens, more than max_tokens (\d+); one prompt was learned instead\./,
    (_, tokens, most) => `拼接后有 ${tokens} 个 token，超过最大 token 数 ${most}，因此改为学习一个提示词。`,
  ],
];

const isChinese = () =>
  String(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en").startsWith("zh");

/**
 * Translate the labels and placeholders of a node's widgets.
 * @param {object} definition of the node, as the server sends it; changed in place
 */
export function translateWidgets(definition) {
  if (!isChinese()) return;
  for (const inputs of Object.values(definition.input ?? {}))
    for (const [, options] of Object.values(inputs).filter(Array.isArray))
      for (const name of ["label_on", "label_off", "placeholder"])
        if (options?.[name]) options[name] = CHINESE_WIDGETS[options[name]] ?? options[name];
}

/**
 * A text in the language of the page.
 * @param {keyof typeof ENGLISH} key
 * @param {Record<string, string | number>} [values] what stands in braces in the text
 * @returns {string}
 */
export function text(key, values = {}) {
  const table = isChinese() ? CHINESE : ENGLISH;
  return table[key].replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

/**
 * A note of the server in the language of the page.
 * @param {string} note
 * @returns {string}
 */
export function translateNote(note) {
  if (!isChinese()) return note;
  return CHINESE_NOTES.reduce((text, [english, chinese]) => text.replace(english, chinese), note);
}
