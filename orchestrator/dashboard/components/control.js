// A text field, text area or choice that keeps what is written in it, however often the page around it is drawn anew.
// It says what stands there when the writer pauses, and at once when they leave it.
export default {
  template: `
    <textarea v-if="lines" :rows="lines" v-model="text" @input="later" @change="now" @blur="left" spellcheck="false"></textarea>
    <select v-else-if="options" v-model="text" @change="now" @blur="left">
      <option v-for="[value, label] in options" :key="value" :value="value">{{ label }}</option>
    </select>
    <input v-else-if="moment" type="datetime-local" step="1" v-model="text" @input="later" @change="now" @blur="left" />
    <input v-else type="text" v-model="text" @input="later" @change="now" @blur="left" spellcheck="false" />`,
  props: { initial: String, lines: Number, options: Array, moment: Boolean, wait: Number },
  emits: ["written"],
  data() {
    return { text: this.initial, said: this.initial, times: 0, timer: null, waiting: null };
  },
  methods: {
    left() {
      const waiting = this.waiting;
      this.waiting = null;
      if (waiting) this.$nextTick(() => this.put(waiting.text, waiting.heard));
    },
    later() {
      clearTimeout(this.timer);
      this.timer = setTimeout(this.now, this.wait);
    },
    now() {
      clearTimeout(this.timer);
      if (this.text === this.said) return;
      this.said = this.text;
      this.$emit("written", this.text, ++this.times);
    },
    // What is being written, or was written and is not heard of yet, is not written over; while somebody is in the
    // field, what is to stand there waits until they leave it as it was.
    put(text, heard) {
      if (this.text !== this.said || heard !== this.times) return;
      if (document.activeElement === this.$el && !this.options) {
        this.waiting = { text, heard };
        return;
      }
      this.text = this.said = text;
    },
  },
};
