// Log lines as they come: appended, never drawn again; the oldest go when there are too many.
export default {
  template: `<div class="logbox" tabindex="0" role="log" aria-label="Log lines"><p v-if="empty" class="none">{{ empty }}</p><div ref="lines"></div></div>`,
  props: { empty: String, limit: { type: Number, default: 5000 } },
  methods: {
    append(lines, follow) {
      const box = this.$el;
      const list = this.$refs.lines;
      const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
      const fragment = document.createDocumentFragment();
      for (const [at, stream, level, message] of lines) {
        const line = document.createElement("div");
        line.className = `line ${level}`;
        for (const [name, text] of [["t", at], ["s", stream], ["m", message]]) {
          const part = document.createElement("span");
          part.className = name;
          part.textContent = text;
          line.append(part);
        }
        fragment.append(line);
      }
      list.append(fragment);
      while (list.childElementCount > this.limit) list.firstElementChild.remove();
      if (follow && atEnd) box.scrollTop = box.scrollHeight;
    },
    clear() {
      this.$refs.lines.replaceChildren();
    },
  },
};
