// A place to drop image files on, or to choose them by the keyboard. They are sent one after the other; the server
// hears their ids when all have arrived, or, where some were refused, when whoever reads that goes on with the others.
export default {
  template: `
    <div class="drop" :class="{ over }" @dragover.prevent="over = true" @dragleave="over = false" @drop.prevent="dropped">
      <label class="btn">
        Choose images<input type="file" class="unseen" multiple accept="image/*" :disabled="busy" @change="chosen" />
      </label>
      <span class="soft" role="status">{{ said || hint }}</span>
      <button v-if="left.length" type="button" class="btn main" @click="emit(left)">
        Look at the {{ left.length === 1 ? "other one" : "other " + left.length }}
      </button>
    </div>`,
  props: { to: String, hint: String, most: Number, mostBytes: Number },
  emits: ["sent"],
  data() {
    return { over: false, busy: false, said: "", left: [] };
  },
  methods: {
    dropped(event) {
      this.over = false;
      this.send([...event.dataTransfer.files]);
    },
    chosen(event) {
      const files = [...event.target.files];
      event.target.value = "";
      this.send(files);
    },
    async send(files) {
      if (this.busy || !files.length) return;
      if (files.length > this.most) {
        this.said = `${files.length} files: at most ${this.most} at once.`;
        return;
      }
      this.busy = true;
      this.left = [];
      const ids = [], refused = [];
      for (const file of files) {
        this.said = `Sending ${ids.length + refused.length + 1} of ${files.length} …`;
        const why = file.size > this.mostBytes ? "it is too large" : await this.sendOne(file, ids);
        if (why) refused.push(`${file.name}: ${why}`);
      }
      this.busy = false;
      this.said = refused.join(" ");
      // What was refused is to be read before the page is left.
      if (refused.length) this.left = ids;
      else this.emit(ids);
    },
    emit(ids) {
      this.left = [];
      this.$emit("sent", ids);
    },
    async sendOne(file, ids) {
      try {
        const answer = await fetch(this.to, { method: "POST", body: file });
        if (!answer.ok) return await answer.text();
        ids.push((await answer.json()).id);
      } catch {
        return "the server could not be reached";
      }
    },
  },
};
