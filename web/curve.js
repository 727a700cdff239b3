const NAMESPACE = "http://www.w3.org/2000/svg";
const WIDTH = 96;
const HEIGHT = 26;
const MARGIN = 2;

const svg = (tag, className) => {
  const made = document.createElementNS(NAMESPACE, tag);
  made.setAttribute("class", className);
  return made;
};

/** A small curve of similarity over steps. */
export function createCurve() {
  const root = svg("svg", "pez-curve");
  root.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  root.setAttribute("role", "img");
  const area = svg("path", "pez-curve-area");
  const line = svg("path", "pez-curve-line");
  const dot = svg("circle", "pez-curve-dot");
  dot.setAttribute("r", "2");
  root.append(area, line, dot);

  /**
   * @param {[number, number][]} points step and best similarity by then
   * @param {number} step how far the line goes
   * @param {string} label
   */
  function update(points, step, label) {
    root.style.display = points.length > 1 ? "" : "none";
    if (points.length < 2) return;
    const [last, best] = points.at(-1);
    const path = stairs([...points, [Math.max(step, last), best]]);
    const [x, y] = path.at(-1);
    const d = `M${path.map(([px, py]) => `${px.toFixed(1)} ${py.toFixed(1)}`).join("L")}`;
    line.setAttribute("d", d);
    area.setAttribute("d", `${d}L${x.toFixed(1)} ${HEIGHT}L${MARGIN} ${HEIGHT}Z`);
    dot.setAttribute("cx", x.toFixed(1));
    dot.setAttribute("cy", y.toFixed(1));
    root.setAttribute("aria-label", label);
  }

  return { element: root, update };
}

/** The corners of a line that rises where a better prompt was found. */
function stairs(points) {
  const end = points.at(-1)[0] || 1;
  const values = points.map(([, value]) => value);
  const high = Math.max(...values);
  const span = high - Math.min(...values) || 1;
  const x = (step) => MARGIN + (step / end) * (WIDTH - 2 * MARGIN);
  // the first steps gain so much that the later ones would look flat
  const y = (value) => MARGIN + Math.sqrt((high - value) / span) * (HEIGHT - 2 * MARGIN);
  return points.flatMap(([step, value], k) => {
    const here = [x(step), y(value)];
    return k ? [[x(step), y(points[k - 1][1])], here] : [[MARGIN, here[1]], here];
  });
}
